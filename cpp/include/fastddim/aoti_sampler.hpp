// Running a bundle's AOTInductor package with libtorch: the same seeds give the same samples as Python's, to float rounding.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/bundle_sampler.hpp"

namespace fastddim {

namespace detail {

/// What Linux says that this machine's processor has, without underscores; nothing elsewhere.
inline std::set<std::string> cpu_features() {
    std::ifstream stream("/proc/cpuinfo");
    for (std::string line; std::getline(stream, line);) {
        if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
        line.erase(std::remove(line.begin(), line.end(), '_'), line.end());
        std::istringstream words(line.substr(line.find(':') + 1));
        std::set<std::string> features;
        for (std::string word; words >> word;) features.insert(word);
        return features;
    }
    return {};
}

/// A GPU's compute capability, such as 9.0; empty where there is none. The driver's word, as asking libtorch for it takes
/// CUDA's headers.
inline std::string compute_capability(int ordinal) {
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (driver == nullptr) return "";
    const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
    const auto get = reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet"));
    const auto attribute = reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute"));
    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    constexpr int major_attribute = 75, minor_attribute = 76;
    int device = 0, major = 0, minor = 0;
    const bool found = init != nullptr && get != nullptr && attribute != nullptr && init(0) == 0 &&
                       get(&device, ordinal) == 0 && attribute(&major, major_attribute, device) == 0 &&
                       attribute(&minor, minor_attribute, device) == 0;
    return found ? text(major, ".", minor) : "";
}

/// Where a package runs: on the GPU of an index, the current one for -1, or on the CPU.
inline c10::Device pick_device(const Bundle& bundle, c10::DeviceIndex index) {
    if (bundle.manifest.target.value().device != "cuda") return c10::Device(c10::kCPU);
    if (index < 0 && c10::impl::hasDeviceGuardImpl(c10::kCUDA)) {
        const auto* gpus = c10::impl::getDeviceGuardImpl(c10::kCUDA);
        if (gpus->deviceCount() > 0) return gpus->getDevice();
    }
    return c10::Device(c10::kCUDA, std::max(index, c10::DeviceIndex{0}));
}

/// Checks that this machine runs a package's code: where it cannot, calling it would end the process.
inline void require_target(const Bundle& bundle, const c10::Device& device) {
    const Manifest::Target& target = bundle.manifest.target.value();
    const std::string name = "bundle: '" + bundle.path.string() + "' is for ";
#if defined(__x86_64__)
    constexpr std::string_view machine = "x86_64";
#elif defined(__aarch64__)
    constexpr std::string_view machine = "aarch64";
#else
    constexpr std::string_view machine = "another machine";
#endif
    if (target.platform != "linux" || target.machine != machine)
        throw BundleError(name + target.platform + " " + target.machine + ", this program is for linux " +
                          std::string(machine) + "; export it here");
    const std::set<std::string> have = cpu_features();
    std::string missing;
    for (const std::string& feature : target.cpu_features)
        if (have.count(feature) == 0) missing += (missing.empty() ? "" : ", ") + feature;
    if (!missing.empty())
        throw BundleError(name + "a CPU with " + missing + ", which this one has not; export it here, or with avx2");
    if (!device.is_cuda()) return;
    const std::string here = compute_capability(device.index());
    if (here.empty())
        throw BundleError(name + "CUDA, and there is no GPU " + std::to_string(device.index()) +
                          " here; export it for the CPU");
    if (here != target.compute_capability)
        throw BundleError(name + "compute capability " + target.compute_capability + ", this GPU has " + here +
                          "; export it here");
}

}  // namespace detail

/// Samples from a bundle. Several threads may call one sampler at a time; `runners` of them run, the others wait.
class AotiSampler : public detail::BundleSampler<AotiSampler, at::Tensor> {
    using Base = detail::BundleSampler<AotiSampler, at::Tensor>;
    friend Base;

   public:
    /// bundle: what `open_bundle` gives.
    /// device_index: the GPU's number, for packages for CUDA; the current one by default.
    /// check_finite: look for NaN and infinities in results, and find the step at which they appeared.
    /// runners: how many calls may run at a time, each with memory of its own.
    ///
    /// Throws BundleError: no AOTInductor bundle, one for another machine or GPU, one that libtorch cannot load, or with
    /// inputs of a dtype that is not supported here; std::invalid_argument: no runners. Calls throw c10::Error too.
    explicit AotiSampler(Bundle bundle, c10::DeviceIndex device_index = -1, bool check_finite = false,
                         std::size_t runners = 1)
        : Base(std::move(bundle), "aoti", check_finite),
          device_(detail::pick_device(this->bundle(), device_index)) {
        if (runners == 0) throw std::invalid_argument("runners: 0; pass an integer >= 1");
        detail::require_target(this->bundle(), device_);
        try {
            loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
                this->bundle().model_path().string(), "model", false, runners, device_.index());
        } catch (const std::exception& error) {
            throw BundleError("bundle: '" + this->bundle().model_path().string() + "' cannot be loaded: " + error.what() +
                              "; export it again, with this libtorch's version");
        }
    }

   private:
    static std::optional<c10::ScalarType> type_of(const std::string& dtype) noexcept {
        if (dtype == "float32") return c10::kFloat;
        if (dtype == "float64") return c10::kDouble;
        if (dtype == "int64") return c10::kLong;
        if (dtype == "int32") return c10::kInt;
        if (dtype == "uint8") return c10::kByte;
        if (dtype == "bool") return c10::kBool;
        if (dtype == "float16") return c10::kHalf;
        return std::nullopt;
    }

    static bool takes(const std::string& dtype) noexcept { return type_of(dtype).has_value(); }

    static at::Tensor view(void* data, std::size_t, const std::string& dtype, const std::vector<std::int64_t>& shape) {
        return at::from_blob(data, shape, at::TensorOptions(type_of(dtype).value()));
    }

    std::vector<at::Tensor> call(const Inputs& inputs, const std::vector<const char*>& outputs) const {
        const c10::InferenceMode guard;
        const Manifest& manifest = bundle().manifest;
        std::vector<at::Tensor> ordered;
        for (const TensorInfo& info : manifest.inputs) {
            const auto found = std::find(inputs.names.begin(), inputs.names.end(), info.name);
            const at::Tensor& value = inputs.values[static_cast<std::size_t>(found - inputs.names.begin())];
            // A number of steps sizes tensors on the host.
            ordered.push_back(info.name == "num_inference_steps" ? value : value.to(device_));
        }
        std::vector<at::Tensor> all = loader_->boxed_run(std::move(ordered)), results;
        for (const char* output : outputs) {
            const auto named = [&](const TensorInfo& info) { return info.name == output; };
            const auto which = std::find_if(manifest.outputs.begin(), manifest.outputs.end(), named);
            results.push_back(all.at(static_cast<std::size_t>(which - manifest.outputs.begin())));
        }
        return results;
    }

    Array<float> to_array(const at::Tensor& tensor) const {
        if (tensor.scalar_type() != c10::kFloat)
            throw BundleError("bundle: '" + bundle().model_path().string() + "' returns no float32; export it again");
        const at::Tensor whole = tensor.cpu().contiguous();
        const float* values = whole.const_data_ptr<float>();
        return {whole.sizes().vec(), {values, values + whole.numel()}};
    }

    c10::Device device_;
    std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

}  // namespace fastddim
