// A StepKernel for the Python tests: JSON requests on the standard input, one a line, each answered by a line of JSON.
//   {"driver": NAME}                                  another library of the driver, for the requests that follow
//   {"load": FOLDER, "batch": N}                      the kernels
//   {"table": TABLE}                                  a manifest's table, put on the device
//   {"launch": {NAME: ARRAY}, "steps": N, "eta": X, "row": K, "stream": N}
//     ARRAY: {"dtype": NAME, "size": N, "file": PATH, "save": PATH, "shift": BYTES, "same_as": NAME}: memory with a
//     file's bytes, written back after the launch; "table", "step" and "timesteps" are those of the default schedule where
//     they are null. The answer has the addresses, and that schedule's numbers as they are on the device.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastddim/step_kernel.hpp"

namespace {

using Json = nlohmann::json;
using fastddim::DeviceArray;
using fastddim::StepArguments;

fastddim::DType dtype_of(const std::string& name) {
    for (int k = 0; k < 6; ++k)
        if (name == fastddim::name_of(static_cast<fastddim::DType>(k))) return static_cast<fastddim::DType>(k);
    throw std::runtime_error("no dtype " + name);
}

DeviceArray StepArguments::*member_of(const std::string& name) {
    for (const auto& slot : fastddim::detail::step_slots)
        if (name == slot.name) return slot.member;
    throw std::runtime_error("no argument " + name);
}

class StepDriver {
   public:
    Json answer(const Json& request) {
        if (request.contains("driver")) {
            driver_.emplace(request.at("driver").get<std::string>());
            return Json::object();
        }
        if (request.contains("load")) {
            kernel_.reset();
            device_.reset();
            device_.emplace(0, driver_ ? *driver_ : fastddim::Driver::shared());
            kernel_.emplace(*device_, fastddim::open_kernels(request.at("load").get<std::string>()), request.at("batch"));
            return {{"tier", kernel_->tier()}};
        }
        if (request.contains("table")) {
            const std::string file = "request";
            if (!device_) device_.emplace(0, driver_ ? *driver_ : fastddim::Driver::shared());
            fastddim::DeviceTable(*device_, fastddim::detail::parse_table({request.at("table"), file}, {}));
            return Json::object();
        }
        return launch(request);
    }

   private:
    Json launch(const Json& request) {
        const fastddim::Schedule schedule;
        const auto steps = request.at("steps").get<std::int64_t>();
        std::vector<fastddim::Transition> transitions;
        if (steps != 0) transitions = schedule.transitions(steps);
        const auto table = fastddim::StepTable::build(schedule, transitions, request.at("eta"));
        const fastddim::DeviceTable rows(device_.value(), table);
        StepArguments arguments;
        std::map<std::string, fastddim::DeviceMemory> memory;
        for (const auto& [name, array] : request.at("launch").items()) {
            DeviceArray& argument = arguments.*member_of(name);
            if (array.is_null()) {
                argument = name == "table"  ? rows.columns()
                           : name == "step" ? rows.step(request.value("row", std::size_t{0}))
                                            : rows.timesteps();
                continue;
            }
            argument = {0, dtype_of(array.at("dtype")), array.at("size")};
            if (array.contains("same_as")) continue;
            const std::size_t shift = array.value("shift", std::size_t{0});
            const std::size_t bytes = std::max<std::size_t>(1, argument.size * fastddim::size_of(argument.dtype));
            auto& held = memory.emplace(name, fastddim::DeviceMemory(*device_, bytes + shift)).first->second;
            argument.address = held.address() + shift;
            if (array.contains("file")) held.upload(read(array.at("file"), held.bytes()).data());
        }
        for (const auto& [name, array] : request.at("launch").items())
            if (array.is_object() && array.contains("same_as"))
                (arguments.*member_of(name)).address =
                    (arguments.*member_of(array.at("same_as"))).address + array.value("shift", 0U);
        kernel_.value().launch(reinterpret_cast<CUstream>(request.value("stream", std::uintptr_t{0})), arguments);
        Json addresses;
        for (const auto& [name, member] : fastddim::detail::step_slots) addresses[name] = (arguments.*member).address;
        for (const auto& [name, array] : request.at("launch").items()) {
            if (!array.is_object() || !array.contains("save")) continue;
            std::vector<char> content(memory.at(name).bytes());
            memory.at(name).download(content.data());
            std::ofstream(array.at("save").get<std::string>(), std::ios::binary)
                .write(content.data(), static_cast<std::streamsize>(content.size()));
        }
        return {{"addresses", addresses},
                {"columns", download<double>(rows.columns())},
                {"timesteps", download<std::int64_t>(rows.timesteps())}};
    }

    template <class T>
    std::vector<T> download(const DeviceArray& array) const {
        std::vector<T> values(array.size);
        const fastddim::Device::Scope scope(*device_);
        const fastddim::Driver& driver = device_->driver();
        driver.check("cuMemcpyDtoH", driver.download(values.data(), array.address, array.size * sizeof(T)));
        return values;
    }

    static std::vector<char> read(const std::string& path, std::size_t bytes) {
        std::ifstream stream(path, std::ios::binary);
        std::vector<char> content{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
        if (content.size() != bytes) throw std::runtime_error(path + " has " + std::to_string(content.size()) + " bytes");
        return content;
    }

    std::optional<fastddim::Driver> driver_;
    std::optional<fastddim::Device> device_;
    std::optional<fastddim::StepKernel> kernel_;
};

}  // namespace

int main() {
    StepDriver driver;
    for (std::string line; std::getline(std::cin, line);) {
        Json answer;
        try {
            answer = driver.answer(Json::parse(line));
        } catch (const fastddim::BundleError& error) {
            answer = {{"error", "BundleError"}, {"message", error.what()}};
        } catch (const fastddim::CudaError& error) {
            answer = {{"error", "CudaError"}, {"message", error.what()}};
        } catch (const std::invalid_argument& error) {
            answer = {{"error", "invalid_argument"}, {"message", error.what()}};
        } catch (const std::exception& error) {
            answer = {{"error", "other"}, {"message", error.what()}};
        }
        std::cout << answer.dump(-1, ' ', true, Json::error_handler_t::replace) << "\n" << std::flush;
    }
    return 0;
}
