// Running a bundle with ONNX Runtime: the same seeds give the same samples as Python's, to float rounding.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/bundle_sampler.hpp"
#include "fastddim/run_values.hpp"

namespace fastddim {

/// Samples from a bundle. A call changes nothing in it, so several threads may call one sampler at a time.
class OrtSampler : public detail::BundleSampler<OrtSampler, Ort::Value> {
    using Base = detail::BundleSampler<OrtSampler, Ort::Value>;
    friend Base;

   public:
    /// bundle: what `open_bundle` gives.
    /// options: ONNX Runtime's, for threads and execution providers.
    /// check_finite: look for NaN and infinities in results, and find the step at which they appeared.
    ///
    /// Throws BundleError: no ONNX bundle, one that ONNX Runtime cannot load, or with inputs of a dtype that is not
    /// supported here. Calls throw Ort::Exception too.
    explicit OrtSampler(Bundle bundle, const Ort::SessionOptions& options = Ort::SessionOptions{},
                        bool check_finite = false)
        : Base(std::move(bundle), "onnx", check_finite),
          environment_(ORT_LOGGING_LEVEL_WARNING, "fastddim"),
          session_(load(this->bundle().model_path(), options)) {
        if (this->bundle().manifest.before) before_ = load(this->bundle().before_path(), options);
    }

    /// What the graph before the steps computes for a prepared call's run of a table, once; nothing without such a graph.
    RunValues compute_values(PreparedCall& ready, const StepTable& table) const {
        const std::optional<Manifest::Component>& described = bundle().manifest.before;
        if (!described) return {};
        const auto steps = static_cast<std::int64_t>(table.size());
        std::vector<unsigned char> timesteps = table.timestep_bytes();
        Inputs inputs = view_feeds(ready.feeds, described->inputs);
        inputs.add("timesteps", view(timesteps.data(), timesteps.size(), table.timestep_dtype(), {steps}));
        std::vector<const char*> names;
        for (const TensorInfo& info : described->outputs) names.push_back(info.name.c_str());
        std::vector<Feed> values;
        for (const Ort::Value& value : run(before_, inputs, names))
            values.push_back(to_feed(value, described->outputs[values.size()]));
        try {
            return RunValues(std::move(values), described->outputs, steps, ready.start.shape[0]);
        } catch (const std::invalid_argument& error) {
            throw BundleError("bundle: '" + bundle().before_path().string() + "' returns " + error.what() +
                              "; export it again");
        }
    }

   private:
    Ort::Session load(const std::filesystem::path& path, const Ort::SessionOptions& options) const {
        try {
            return Ort::Session(environment_, path.c_str(), options);
        } catch (const Ort::Exception& error) {
            throw BundleError("bundle: '" + path.string() + "' cannot be loaded: " + error.what() +
                              "; export it again, or update ONNX Runtime");
        }
    }

    /// ONNX Runtime's type of a dtype, and its bytes; UNDEFINED and 0 for one that is not supported here.
    static std::pair<ONNXTensorElementDataType, std::size_t> type_of(const std::string& dtype) noexcept {
        if (dtype == "float32") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4};
        if (dtype == "float64") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8};
        if (dtype == "int64") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8};
        if (dtype == "int32") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4};
        if (dtype == "uint8") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1};
        if (dtype == "bool") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1};
        if (dtype == "float16") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2};
        return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, 0};
    }

    static bool takes(const std::string& dtype) noexcept { return type_of(dtype).second != 0; }

    static Ort::Value view(void* data, std::size_t bytes, const std::string& dtype,
                           const std::vector<std::int64_t>& shape) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        return Ort::Value::CreateTensor(memory, data, bytes, shape.data(), shape.size(), type_of(dtype).first);
    }

    std::vector<Ort::Value> call(const Inputs& inputs, const std::vector<const char*>& outputs) const {
        return run(session_, inputs, outputs);
    }

    static std::vector<Ort::Value> run(Ort::Session& session, const Inputs& inputs,
                                       const std::vector<const char*>& outputs) {
        return session.Run(Ort::RunOptions{nullptr}, inputs.names.data(), inputs.values.data(), inputs.values.size(),
                           outputs.data(), outputs.size());
    }

    /// An output of the graph before the steps, as its description has it.
    Feed to_feed(const Ort::Value& value, const TensorInfo& described) const {
        const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
        const auto [type, bytes] = type_of(described.dtype);
        if (info.GetElementType() != type)
            throw BundleError("bundle: '" + bundle().before_path().string() + "' returns no " + described.dtype + " as '" +
                              described.name + "'; export it again");
        const auto* const data = static_cast<const unsigned char*>(value.GetTensorRawData());
        return {described.name, described.dtype, info.GetShape(), {data, data + bytes * info.GetElementCount()}};
    }

    Array<float> to_array(const Ort::Value& value) const {
        const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
        if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
            throw BundleError("bundle: '" + bundle().model_path().string() + "' returns no float32; export it again");
        const float* values = value.GetTensorData<float>();
        return {info.GetShape(), {values, values + info.GetElementCount()}};
    }

    Ort::Env environment_;
    // ONNX Runtime's sessions run on several threads at a time; its C++ class has no const Run.
    mutable Ort::Session session_;
    mutable Ort::Session before_{nullptr};
};

}  // namespace fastddim
