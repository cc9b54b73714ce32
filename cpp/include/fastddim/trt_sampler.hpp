// Running a bundle's TensorRT engine: the same seeds give the same samples as Python's, to the engine's rounding. The state
// stays on the GPU from step to step.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/bundle_sampler.hpp"
#include "fastddim/call.hpp"

namespace fastddim {

namespace detail {

inline void require_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(text(what, ": ", cudaGetErrorString(status)));
}

/// Makes a GPU the thread's current one, until it goes out of scope.
class CurrentDevice {
   public:
    explicit CurrentDevice(int device) {
        require_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        require_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;
    ~CurrentDevice() { cudaSetDevice(before_); }

   private:
    int before_ = 0;
};

/// Memory of the GPU that is current.
class DeviceMemory {
   public:
    explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) { require_cuda(cudaMalloc(&data_, bytes), "cudaMalloc"); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory() { cudaFree(data_); }

    void* data() const noexcept { return data_; }
    std::size_t bytes() const noexcept { return bytes_; }

   private:
    void* data_ = nullptr;
    std::size_t bytes_;
};

class CudaStream {
   public:
    explicit CudaStream(cudaStream_t given) : stream_(given), own_(given == nullptr) {
        if (own_) require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    }
    CudaStream(const CudaStream&) = delete;
    CudaStream& operator=(const CudaStream&) = delete;
    ~CudaStream() {
        if (own_) cudaStreamDestroy(stream_);
    }

    cudaStream_t get() const noexcept { return stream_; }

   private:
    cudaStream_t stream_;
    bool own_;
};

/// Keeps the last error for messages.
class TrtLog : public nvinfer1::ILogger {
   public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::lock_guard<std::mutex> guard(mutex_);
        last_ = message;
    }

    /// The error since the last time that this was asked for.
    std::string take() {
        const std::lock_guard<std::mutex> guard(mutex_);
        const std::string taken = std::exchange(last_, {});
        return taken.empty() ? "it gives no reason" : taken;
    }

   private:
    std::mutex mutex_;
    std::string last_;
};

/// An input on the host, or an output on the GPU.
struct TrtTensor {
    const void* data = nullptr;
    std::size_t bytes = 0;
    std::vector<std::int64_t> shape;
    bool on_device = false;
};

/// A context of one profile, its memory on the GPU, and the graph of its last sizes.
class TrtExecution {
   public:
    TrtExecution(nvinfer1::ICudaEngine& engine, int profile, cudaStream_t stream, bool cuda_graph, TrtLog& log)
        : context_(engine.createExecutionContext()), stream_(stream), cuda_graph_(cuda_graph), log_(log) {
        require(context_ != nullptr, "has no context");
        require(context_->setOptimizationProfileAsync(profile, stream), "refuses a profile");
    }
    TrtExecution(const TrtExecution&) = delete;
    TrtExecution& operator=(const TrtExecution&) = delete;
    ~TrtExecution() { drop_graph(); }

    /// A call whose conditions are others than the last one's begins.
    void begin() noexcept { loaded_.clear(); }

    /// Puts the work of one call of the engine on the stream; returns outputs, which stay until the next call.
    std::vector<TrtTensor> run(const std::vector<const char*>& names, const std::vector<TrtTensor>& values,
                               const std::vector<TensorInfo>& outputs, const std::vector<const char*>& wanted) {
        resize(names, values, outputs);
        for (std::size_t k = 0; k < names.size(); ++k) load(names[k], values[k]);
        enqueue();
        std::vector<TrtTensor> results;
        for (const char* name : wanted)
            results.push_back({memory_.at(name)->data(), size_of(name, "float32"), shapes_.at(name), true});
        return results;
    }

   private:
    using Shapes = std::map<std::string, std::vector<std::int64_t>>;

    void require(bool holds, const std::string& what) const {
        if (!holds) throw std::runtime_error("TensorRT " + what + ": " + log_.take());
    }

    std::size_t size_of(const std::string& name, const std::string& dtype) const {
        const std::size_t width = dtype == "int64" ? 8 : dtype == "float16" ? 2 : dtype == "bool" || dtype == "uint8" ? 1 : 4;
        return width * count_of(name.c_str(), shapes_.at(name));
    }

    /// Shapes and addresses, where they are not the last call's.
    void resize(const std::vector<const char*>& names, const std::vector<TrtTensor>& values,
                const std::vector<TensorInfo>& outputs) {
        Shapes wanted;
        std::int64_t steps = steps_;
        for (std::size_t k = 0; k < names.size(); ++k) {
            wanted[names[k]] = values[k].shape;
            if (is_host(names[k])) std::memcpy(&steps, values[k].data, sizeof(steps));
        }
        if (wanted == inputs_ && steps == steps_) return;
        drop_graph();
        // Until all is in place again, so that a failure does not pass for it.
        inputs_.clear();
        steps_ = steps;
        for (std::size_t k = 0; k < names.size(); ++k) {
            const TrtTensor& value = values[k];
            const std::string name = names[k];
            require(context_->setInputShape(name.c_str(), to_dims(value.shape)), "refuses " + name + " " + shown(value.shape));
            shapes_[name] = value.shape;
            place(name, value.bytes);
        }
        const char* missing = nullptr;
        require(context_->inferShapes(1, &missing) == 0, text("has no value for ", missing == nullptr ? "" : missing));
        for (const TensorInfo& info : outputs) {
            const nvinfer1::Dims dims = context_->getTensorShape(info.name.c_str());
            require(dims.nbDims >= 0, "does not know the shape of " + info.name);
            shapes_[info.name].assign(dims.d, dims.d + dims.nbDims);
            place(info.name, size_of(info.name, info.dtype));
        }
        inputs_ = std::move(wanted);
    }

    /// The number of steps of a baked schedule, which TensorRT reads on the host.
    static bool is_host(const std::string& name) noexcept { return name == "num_inference_steps"; }

    static nvinfer1::Dims to_dims(const std::vector<std::int64_t>& shape) {
        nvinfer1::Dims dims{};
        if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS))
            throw std::invalid_argument("shape: " + shown(shape) + " has more dimensions than TensorRT takes");
        dims.nbDims = static_cast<std::int32_t>(shape.size());
        for (std::size_t k = 0; k < shape.size(); ++k) dims.d[k] = shape[k];
        return dims;
    }

    void place(const std::string& name, std::size_t bytes) {
        void* address = &steps_;
        if (!is_host(name)) {
            std::unique_ptr<DeviceMemory>& memory = memory_[name];
            if (memory == nullptr || memory->bytes() < bytes) {
                // Work that still uses the old memory comes first.
                require_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
                memory = std::make_unique<DeviceMemory>(bytes);
                loaded_.erase(name);
            }
            address = memory->data();
        }
        require(context_->setTensorAddress(name.c_str(), address), "refuses the address of " + name);
    }

    void load(const std::string& name, const TrtTensor& value) {
        if (is_host(name) || loaded_.count(name) != 0) return;
        const cudaMemcpyKind kind = value.on_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
        require_cuda(cudaMemcpyAsync(memory_.at(name)->data(), value.data, value.bytes, kind, stream_), "cudaMemcpyAsync");
        // The state and the table change from step to step, guidance scales and conditions do not.
        if (!is_own(name) || name.rfind("guidance_", 0) == 0) loaded_[name] = true;
    }

    void enqueue() {
        // The first run of new sizes sets the engine up, which a capture must not hold.
        if (!cuda_graph_ || !warm_) {
            require(context_->enqueueV3(stream_), "does not run the engine");
            warm_ = true;
            return;
        }
        if (graph_ == nullptr && !capture()) {
            cuda_graph_ = false;
            // A failed capture must not look like the next call's failure.
            cudaGetLastError();
            require(context_->enqueueV3(stream_), "does not run the engine");
            return;
        }
        require_cuda(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    }

    /// Whether the engine's work could be captured; an engine with a loop may wait for the GPU, which cannot.
    bool capture() {
        if (cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) != cudaSuccess) return false;
        const bool queued = context_->enqueueV3(stream_);
        cudaGraph_t graph = nullptr;
        const bool ended = cudaStreamEndCapture(stream_, &graph) == cudaSuccess;
        const bool made = queued && ended && cudaGraphInstantiateWithFlags(&graph_, graph, 0) == cudaSuccess;
        if (graph != nullptr) cudaGraphDestroy(graph);
        if (!made) graph_ = nullptr;
        return made;
    }

    void drop_graph() noexcept {
        if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
        graph_ = nullptr;
        warm_ = false;
    }

    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    cudaStream_t stream_;
    bool cuda_graph_;
    TrtLog& log_;
    std::map<std::string, std::unique_ptr<DeviceMemory>> memory_;
    std::map<std::string, bool> loaded_;
    /// The shapes of the last call's inputs, and those of inputs and outputs.
    Shapes inputs_, shapes_;
    std::int64_t steps_ = 0;
    bool warm_ = false;
    cudaGraphExec_t graph_ = nullptr;
};

}  // namespace detail

/// How a TrtSampler runs.
struct TrtOptions {
    /// Look for NaN and infinities in results, and find the step at which they appeared.
    bool check_finite = false;
    /// Capture the engine's work for the sizes of a call, and replay it while they stay the same.
    bool cuda_graph = false;
    /// Where the work goes; a stream of the sampler's own by default.
    cudaStream_t stream = nullptr;
};

/// Samples from a bundle on the GPU that was current when it was made. Calls from several threads take turns.
///
/// It is compiled for one flavour of TensorRT: the standard one, or TensorRT for RTX with FASTDDIM_TENSORRT_RTX defined.
class TrtSampler : public detail::BundleSampler<TrtSampler, detail::TrtTensor> {
    using Base = detail::BundleSampler<TrtSampler, detail::TrtTensor>;
    friend Base;

   public:
    /// bundle: what `open_bundle` gives.
    ///
    /// Throws BundleError: no TensorRT bundle, one of another flavour, version or GPU, one that does not load, or with
    /// inputs of a dtype that is not supported here. Calls throw std::runtime_error for what TensorRT or CUDA refuses.
    explicit TrtSampler(Bundle bundle, const TrtOptions& options = {})
        : Base(std::move(bundle), "tensorrt", options.check_finite),
          cuda_graph_(options.cuda_graph),
          log_(std::make_unique<detail::TrtLog>()) {
        const std::string content = read_engine();
        device_ = require_gpu();
        stream_ = std::make_unique<detail::CudaStream>(options.stream);
        runtime_.reset(nvinfer1::createInferRuntime(*log_));
        if (runtime_ == nullptr) throw failed("has no runtime");
        // The engine brings the runtime of its own version with it.
        runtime_->setEngineHostCodeAllowed(engine_info().version_compatible);
        engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
        if (engine_ == nullptr) throw failed("does not load");
        require_dtypes();
    }

    /// float `[B, ...]`, as `OrtSampler`'s.
    Array<float> operator()(const Call& call) const {
        const std::lock_guard<std::mutex> turn(*mutex_);
        const detail::CurrentDevice current(device_);
        for (auto& [profile, execution] : executions_) execution->begin();
        return Base::operator()(call);
    }

   private:
#ifdef FASTDDIM_TENSORRT_RTX
    static constexpr const char* flavour = "rtx";
    static constexpr const char* magic = "vtrt";
#else
    static constexpr const char* flavour = "standard";
    static constexpr const char* magic = "ftrt";
#endif

    const Manifest::Engine& engine_info() const noexcept { return *bundle().manifest.engine; }

    BundleError failed(const std::string& what) const {
        return BundleError("bundle: '" + bundle().model_path().string() + "' " + what + ": " + log_->take() +
                           "; export it again, with the TensorRT that is here");
    }

    /// The engine's file, its first bytes and version checked.
    std::string read_engine() const {
        const std::string named = "bundle: '" + bundle().model_path().string() + "' ";
        const Manifest::Engine& info = engine_info();
        if (info.flavour != flavour)
            throw BundleError(named + "is of flavour '" + info.flavour + "', this program has '" + flavour +
                              "'; export it with that");
        if (info.strip_plan)
            throw BundleError(named + "was built without its weights, which this loader does not fill in; build it without "
                                      "strip_plan");
        std::string content = detail::read_all(bundle().model_path());
        constexpr std::size_t header = 28, version = 24;
        if (content.size() < header || content.compare(0, 4, magic) != 0)
            throw BundleError(named + "is no engine of flavour '" + flavour + "'; export it again");
        const std::array<int, 4> built = numbers(info.version);
        for (std::size_t k = 0; k < built.size(); ++k)
            if (static_cast<unsigned char>(content[version + k]) != static_cast<unsigned char>(built[k]))
                throw BundleError(named + "is not of version " + info.version + " as the manifest says; export it again");
        const std::array<int, 3> here{getInferLibMajorVersion(), getInferLibMinorVersion(), getInferLibPatchVersion()};
        const std::array<int, 3> needed{built[0], built[1], built[2]};
        if (here != needed && !(info.version_compatible && here[0] == needed[0] && here > needed))
            throw BundleError(named + "was built by version " + info.version + ", this is " +
                              detail::text(here[0], ".", here[1], ".", here[2]) +
                              "; install that version, or export it again");
        return content;
    }

    static std::array<int, 4> numbers(const std::string& version) {
        std::array<int, 4> parts{};
        std::istringstream stream(version);
        stream.imbue(std::locale::classic());
        char point = 0;
        for (int& part : parts) stream >> part >> point;
        return parts;
    }

    /// The GPU that is current, one that the engine is for.
    int require_gpu() const {
        int device = 0, major = 0, minor = 0;
        detail::require_cuda(cudaGetDevice(&device), "cudaGetDevice");
        detail::require_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
        detail::require_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
        const std::string here = detail::text(major, ".", minor);
        const Manifest::Engine& info = engine_info();
        bool fits = info.compute_capabilities.empty() || (info.ampere_plus && major >= 8);
        std::string listed;
        for (const std::string& capability : info.compute_capabilities) {
            fits = fits || capability == here;
            listed += (listed.empty() ? "" : ", ") + capability;
        }
        if (!fits)
            throw BundleError("bundle: '" + bundle().path.string() + "' is for compute capability " + listed +
                              ", this GPU has " + here + "; export it for this one");
        return device;
    }

    static std::optional<nvinfer1::DataType> type_of(const std::string& dtype) noexcept {
        if (dtype == "float32") return nvinfer1::DataType::kFLOAT;
        if (dtype == "int64") return nvinfer1::DataType::kINT64;
        if (dtype == "int32") return nvinfer1::DataType::kINT32;
        if (dtype == "uint8") return nvinfer1::DataType::kUINT8;
        if (dtype == "bool") return nvinfer1::DataType::kBOOL;
        if (dtype == "float16") return nvinfer1::DataType::kHALF;
        return std::nullopt;
    }

    static bool takes(const std::string& dtype) noexcept { return type_of(dtype).has_value(); }

    /// Memory is sized by the manifest, so the engine has to agree with it.
    void require_dtypes() const {
        const Manifest& manifest = bundle().manifest;
        for (const auto* tensors : {&manifest.inputs, &manifest.outputs})
            for (const TensorInfo& info : *tensors)
                if (type_of(info.dtype) != engine_->getTensorDataType(info.name.c_str()))
                    throw BundleError("bundle: '" + bundle().model_path().string() + "' has no '" + info.name +
                                      "' of dtype " + info.dtype + " as the manifest says; export it again");
    }

    static detail::TrtTensor view(void* data, std::size_t bytes, const std::string&,
                                  const std::vector<std::int64_t>& shape) {
        return {data, bytes, shape, false};
    }

    std::vector<detail::TrtTensor> call(const Inputs& inputs, const std::vector<const char*>& outputs) const {
        const int profile = pick_profile(inputs);
        auto found = executions_.find(profile);
        if (found == executions_.end())
            found = executions_
                        .emplace(profile, std::make_unique<detail::TrtExecution>(*engine_, profile, stream_->get(),
                                                                                 cuda_graph_, *log_))
                        .first;
        return found->second->run(inputs.names, inputs.values, bundle().manifest.outputs, outputs);
    }

    /// The first profile that has a call's sizes.
    int pick_profile(const Inputs& inputs) const {
        std::map<std::string, std::int64_t> sizes;
        for (std::size_t k = 0; k < inputs.names.size(); ++k) {
            const TensorInfo* info = bundle().manifest.find_input(inputs.names[k]);
            const std::vector<std::int64_t>& shape = inputs.values[k].shape;
            for (std::size_t dim = 0; dim < shape.size(); ++dim)
                if (!info->shape[dim].fixed()) sizes[info->shape[dim].name] = shape[dim];
            if (info->name == "num_inference_steps")
                std::memcpy(&sizes["steps"], inputs.values[k].data, sizeof(std::int64_t));
        }
        const auto& profiles = engine_info().profiles;
        std::string taken;
        for (std::size_t index = 0; index < profiles.size(); ++index) {
            bool fits = true;
            for (const auto& [name, range] : profiles[index]) {
                const auto found = sizes.find(name);
                if (found == sizes.end()) continue;
                fits = fits && range[0] <= found->second && found->second <= range[2];
                taken += detail::text(taken.empty() ? "" : ", ", name, " ", range[0], " to ", range[2]);
            }
            if (fits) return static_cast<int>(index);
        }
        std::string given;
        for (const auto& [name, size] : sizes) given += detail::text(given.empty() ? "" : ", ", name, " ", size);
        throw std::invalid_argument("size: " + given + "; this engine takes " + taken + "; build one with such a profile");
    }

    Array<float> to_array(const detail::TrtTensor& tensor) const {
        Array<float> array{tensor.shape, std::vector<float>(detail::count_of("samples", tensor.shape))};
        detail::require_cuda(
            cudaMemcpyAsync(array.values.data(), tensor.data, tensor.bytes, cudaMemcpyDeviceToHost, stream_->get()),
            "cudaMemcpyAsync");
        detail::require_cuda(cudaStreamSynchronize(stream_->get()), "cudaStreamSynchronize");
        return array;
    }

    bool cuda_graph_;
    int device_ = 0;
    std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
    // In the order in which they are needed: what comes later goes first.
    std::unique_ptr<detail::TrtLog> log_;
    std::unique_ptr<detail::CudaStream> stream_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    mutable std::map<int, std::unique_ptr<detail::TrtExecution>> executions_;
};

}  // namespace fastddim
