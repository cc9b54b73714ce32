// Running a bundle with ONNX Runtime: the same seeds give the same samples as Python's, to float rounding.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/bundle_sampler.hpp"

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
          session_(load(environment_, this->bundle(), options)) {}

   private:
    static Ort::Session load(const Ort::Env& environment, const Bundle& bundle, const Ort::SessionOptions& options) {
        try {
            return Ort::Session(environment, bundle.model_path().c_str(), options);
        } catch (const Ort::Exception& error) {
            throw BundleError("bundle: '" + bundle.model_path().string() + "' cannot be loaded: " + error.what() +
                              "; export it again, or update ONNX Runtime");
        }
    }

    static ONNXTensorElementDataType type_of(const std::string& dtype) noexcept {
        if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        if (dtype == "float64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
        if (dtype == "int64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        if (dtype == "int32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        if (dtype == "uint8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        if (dtype == "bool") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }

    static bool takes(const std::string& dtype) noexcept {
        return type_of(dtype) != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }

    static Ort::Value view(void* data, std::size_t bytes, const std::string& dtype,
                           const std::vector<std::int64_t>& shape) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        return Ort::Value::CreateTensor(memory, data, bytes, shape.data(), shape.size(), type_of(dtype));
    }

    std::vector<Ort::Value> call(const Inputs& inputs, const std::vector<const char*>& outputs) const {
        return session_.Run(Ort::RunOptions{nullptr}, inputs.names.data(), inputs.values.data(), inputs.values.size(),
                            outputs.data(), outputs.size());
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
};

}  // namespace fastddim
