// An OrtSampler, an AotiSampler or a TrtSampler, for the Python tests and benchmarks: JSON requests on the standard input,
// one a line; the answer to each is a line of JSON and, where it says so, `bytes` of raw floats.
//   {"open": FOLDER, "check_hashes": BOOL}                  a bundle, opened alone
//   {"load": FOLDER, "threads": N, "check_finite": BOOL}    the sampler of the requests that follow; with
//                                                           "runtime": "tensorrt" also "cuda_graph" and "device"
//   {"sample": CALL}, {"concurrent": [CALL, ...]}           a call; several at once, a thread each
#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#ifdef FASTDDIM_DRIVE_AOTI
#include <ATen/Parallel.h>

#include "fastddim/aoti_sampler.hpp"
#else
#include "fastddim/ort_sampler.hpp"
#endif
#ifdef FASTDDIM_DRIVE_TENSORRT
#include "fastddim/trt_sampler.hpp"
#endif

namespace {

using Json = nlohmann::json;

fastddim::Bundle requested(const Json& request) { return fastddim::open_bundle(request.at("load").get<std::string>()); }

using Sampler = std::function<fastddim::Array<float>(const fastddim::Call&)>;

/// A sampler of any runtime, as a function that several threads may call.
template <class T, class... Arguments>
Sampler make(Arguments&&... arguments) {
    const auto sampler = std::make_shared<const T>(std::forward<Arguments>(arguments)...);
    return [sampler](const fastddim::Call& call) { return (*sampler)(call); };
}

#ifdef FASTDDIM_DRIVE_AOTI
Sampler load(const Json& request) {
    at::set_num_threads(request.value("threads", 1));
    return make<fastddim::AotiSampler>(requested(request), c10::DeviceIndex{-1}, request.value("check_finite", false));
}
#else
Sampler load(const Json& request) {
    const bool check_finite = request.value("check_finite", false);
#ifdef FASTDDIM_DRIVE_TENSORRT
    if (request.value("runtime", "onnx") == "tensorrt") {
        fastddim::TrtOptions options;
        options.check_finite = check_finite;
        options.cuda_graph = request.value("cuda_graph", false);
        // Calls come with another GPU current than the one that it was made on.
        cudaSetDevice(request.value("device", 0));
        Sampler sampler = make<fastddim::TrtSampler>(requested(request), options);
        cudaSetDevice(0);
        return sampler;
    }
#endif
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(request.value("threads", 1));
    return make<fastddim::OrtSampler>(requested(request), options, check_finite);
}
#endif

template <class T>
fastddim::Array<T> array(const Json& json) {
    return {json.at("shape").get<std::vector<std::int64_t>>(), json.at("values").get<std::vector<T>>()};
}

fastddim::Condition condition(const Json& json) {
    const std::string dtype = json.at("dtype");
    if (dtype == "float32") return array<float>(json);
    if (dtype == "float64") return array<double>(json);
    if (dtype == "int64") return array<std::int64_t>(json);
    if (dtype == "int32") return array<std::int32_t>(json);
    if (dtype == "uint8") return array<std::uint8_t>(json);
    fastddim::Array<fastddim::Half> halves{json.at("shape").get<std::vector<std::int64_t>>(), {}};
    for (const Json& bits : json.at("values")) halves.values.push_back({bits.get<std::uint16_t>()});
    return halves;
}

std::map<std::string, fastddim::Condition> conditions(const Json& json, const char* group) {
    std::map<std::string, fastddim::Condition> all;
    if (json.contains(group))
        for (const auto& [name, value] : json.at(group).items()) all[name] = condition(value);
    return all;
}

fastddim::Call to_call(const Json& json) {
    fastddim::Call call;
    call.batch = json.value("batch", std::int64_t{1});
    if (json.contains("start")) call.start = array<float>(json.at("start"));
    if (json.contains("seeds")) {
        const Json& seeds = json.at("seeds");
        if (seeds.is_array()) call.seeds = seeds.get<std::vector<std::uint64_t>>();
        if (seeds.is_number()) call.seeds = seeds.get<std::uint64_t>();
    }
    if (json.contains("num_inference_steps")) call.num_inference_steps = json.at("num_inference_steps");
    if (json.contains("timesteps")) call.timesteps = json.at("timesteps").get<std::vector<double>>();
    if (json.contains("eta")) call.eta = json.at("eta");
    if (json.contains("table")) {
        const std::string file = "request";
        call.table = fastddim::detail::parse_table({json.at("table"), file}, fastddim::Manifest{});
    }
    call.guidance_scale = json.value("guidance_scale", std::vector<float>{});
    call.guidance_rescale = json.value("guidance_rescale", std::vector<float>{});
    if (json.contains("size")) call.size = json.at("size").get<std::array<std::int64_t, 2>>();
    call.conditions = conditions(json, "conditions");
    call.uncond_conditions = conditions(json, "uncond_conditions");
    return call;
}

class Driver {
   public:
    Json answer(const Json& request, std::vector<float>& values) {
        if (request.contains("open")) {
            const auto bundle = fastddim::open_bundle(request.at("open").get<std::string>(),
                                                      request.value("check_hashes", true));
            Json components = Json::object();
            for (const auto& [name, component] : bundle.manifest.components)
                components[name] = {bundle.component_path(name).string(), component.upscale.value_or(1)};
            return {{"model", bundle.model_path().string()},
                    {"steps", bundle.manifest.table.size()},
                    {"components", components}};
        }
        if (request.contains("load")) {
            // The old one's memory first.
            sampler_ = nullptr;
            sampler_ = load(request);
            return Json::object();
        }
        const Sampler& sampler = sampler_;
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::int64_t> shape;
        if (request.contains("sample")) {
            auto result = sampler(to_call(request.at("sample")));
            shape = std::move(result.shape);
            values = std::move(result.values);
        } else {
            std::vector<std::future<fastddim::Array<float>>> running;
            for (const Json& one : request.at("concurrent")) {
                const auto run = [&sampler, call = to_call(one)] { return sampler(call); };
                running.push_back(std::async(std::launch::async, run));
            }
            for (auto& each : running) {
                const auto result = each.get();
                values.insert(values.end(), result.values.begin(), result.values.end());
            }
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        return {{"shape", shape}, {"seconds", seconds.count()}};
    }

   private:
    Sampler sampler_;
};

}  // namespace

int main() {
    Driver driver;
    for (std::string line; std::getline(std::cin, line);) {
        std::vector<float> values;
        Json answer;
        try {
            answer = driver.answer(Json::parse(line), values);
        } catch (const fastddim::BundleError& error) {
            answer = {{"error", "BundleError"}, {"message", error.what()}};
        } catch (const fastddim::NotFiniteError& error) {
            answer = {{"error", "NotFiniteError"}, {"message", error.what()}};
        } catch (const std::invalid_argument& error) {
            answer = {{"error", "invalid_argument"}, {"message", error.what()}};
        } catch (const std::exception& error) {
            answer = {{"error", "other"}, {"message", error.what()}};
        }
        answer["bytes"] = values.size() * sizeof(float);
        std::cout << answer.dump(-1, ' ', true, Json::error_handler_t::replace) << "\n";
        std::cout.write(reinterpret_cast<const char*>(values.data()),
                        static_cast<std::streamsize>(values.size() * sizeof(float)));
        std::cout.flush();
    }
    return 0;
}
