// Calls go to the file FAKE_LOG; the one named FAKE_REFUSE fails. FAKE_CAPABILITY is the GPU's, FAKE_VERSION the library's.
//
// The engine's model is `out = 0.1 * x + labels` with guidance, its steps are those of a table. With FAKE_FLOATS timesteps are
// float, and `timestep / 1000` is added to the model's output.
#include "NvInfer.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

using Work = std::vector<std::function<void()>>;

struct FakeStream {
    int device = 0;
    bool capturing = false;
    Work captured;
};
struct FakeGraph {
    Work work;
};
struct FakeGraphExec {
    Work work;
};

namespace {

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value == nullptr ? otherwise : value;
}

/// Keeps a call; whether it goes well.
bool told(const std::string& call) {
    const std::string log = setting("FAKE_LOG", "");
    if (!log.empty()) {
        std::FILE* file = std::fopen(log.c_str(), "a");
        std::fprintf(file, "%s\n", call.c_str());
        std::fclose(file);
    }
    return call.substr(0, call.find(' ')) != setting("FAKE_REFUSE", "");
}

cudaError_t status(const std::string& call) { return told(call) ? cudaSuccess : cudaErrorMemoryAllocation; }

thread_local int current_device = 0;

bool is_current(cudaStream_t stream) { return stream->device == current_device; }

int version(int part) {
    int parts[3] = {10, 14, 1};
    std::sscanf(setting("FAKE_VERSION", "").c_str(), "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
    return parts[part];
}

}  // namespace

const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
cudaError_t cudaGetLastError() { return status("cudaGetLastError"); }
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return status("cudaGetDevice");
}
cudaError_t cudaSetDevice(int device) {
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const std::string capability = setting("FAKE_CAPABILITY", "8.9");
    const std::size_t point = capability.find('.');
    *value = std::stoi(attribute == cudaDevAttrComputeCapabilityMajor ? capability.substr(0, point)
                                                                      : capability.substr(point + 1));
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, std::size_t bytes) {
    if (!told("cudaMalloc")) return cudaErrorMemoryAllocation;
    *data = std::malloc(bytes);
    // NaN, so that what is read before it is written is seen.
    std::memset(*data, 0xFF, bytes);
    return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
    std::free(data);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (!is_current(stream)) return cudaErrorInvalidResourceHandle;
    std::memcpy(to, from, bytes);
    return status("cudaMemcpyAsync " + std::to_string(kind) + " " + std::to_string(bytes));
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
    *stream = new FakeStream{current_device, false, {}};
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return status("cudaStreamSynchronize"); }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->capturing = told("cudaStreamBeginCapture");
    stream->captured.clear();
    return stream->capturing ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    stream->capturing = false;
    if (!told("cudaStreamEndCapture")) return cudaErrorStreamCaptureUnsupported;
    *graph = new FakeGraph{stream->captured};
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    if (!told("cudaGraphInstantiate")) return cudaErrorMemoryAllocation;
    *executable = new FakeGraphExec{graph->work};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    for (const auto& work : executable->work) work();
    return status("cudaGraphLaunch");
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}

std::int32_t getInferLibMajorVersion() noexcept { return version(0); }
std::int32_t getInferLibMinorVersion() noexcept { return version(1); }
std::int32_t getInferLibPatchVersion() noexcept { return version(2); }

namespace nvinfer1 {

IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

void IRuntime::setEngineHostCodeAllowed(bool allowed) noexcept {
    ::told(std::string("setEngineHostCodeAllowed ") + (allowed ? "1" : "0"));
}

ICudaEngine* IRuntime::deserializeCudaEngine(const void*, std::size_t bytes) noexcept {
    logger_->log(ILogger::Severity::kINFO, "Loaded engine");
    if (::told("deserializeCudaEngine " + std::to_string(bytes))) return new ICudaEngine(*logger_);
    logger_->log(ILogger::Severity::kERROR, "it is for another planet");
    return nullptr;
}

IExecutionContext* ICudaEngine::createExecutionContext() noexcept {
    return ::told("createExecutionContext") ? new IExecutionContext(*logger_) : nullptr;
}

DataType ICudaEngine::getTensorDataType(const char* name) const noexcept {
    std::string integers = " labels uncond_labels ";
    if (setting("FAKE_FLOATS", "").empty()) integers += "timestep timesteps ";
    return integers.find(" " + std::string(name) + " ") != std::string::npos ? DataType::kINT64 : DataType::kFLOAT;
}

bool IExecutionContext::told(const std::string& call) noexcept {
    if (::told(call)) return true;
    logger_->log(ILogger::Severity::kERROR, "no");
    return false;
}

bool IExecutionContext::setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) noexcept {
    return told("setOptimizationProfileAsync " + std::to_string(profile));
}

bool IExecutionContext::setInputShape(const char* name, const Dims& dims) noexcept {
    shapes_[name] = dims;
    return told(std::string("setInputShape ") + name);
}

bool IExecutionContext::setTensorAddress(const char* name, void* data) noexcept {
    addresses_[name] = data;
    return data != nullptr && told(std::string("setTensorAddress ") + name);
}

std::int32_t IExecutionContext::inferShapes(std::int32_t, const char** names) noexcept {
    *names = "sample";
    return told("inferShapes") ? 0 : 1;
}

Dims IExecutionContext::getTensorShape(const char*) const noexcept { return shapes_.at("sample"); }

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
    if (!is_current(stream) || !told("enqueueV3")) return false;
    if (stream->capturing) {
        stream->captured.emplace_back([this] { compute(); });
    } else {
        compute();
    }
    return true;
}

void IExecutionContext::compute() const noexcept {
    const auto floats = [&](const char* name) { return static_cast<float*>(addresses_.at(name)); };
    const auto integers = [&](const char* name) { return static_cast<const std::int64_t*>(addresses_.at(name)); };
    const Dims& dims = shapes_.at("sample");
    const auto batch = static_cast<std::size_t>(dims.d[0]);
    std::size_t size = 1;
    for (int k = 1; k < dims.nbDims; ++k) size *= static_cast<std::size_t>(dims.d[k]);
    const bool loop = addresses_.count("samples") != 0;
    const std::size_t steps = loop ? static_cast<std::size_t>(shapes_.at("timesteps").d[0]) : 1;
    const auto columns = static_cast<std::size_t>(shapes_.at("coefficients").d[1]);
    std::vector<float> x(floats("sample"), floats("sample") + batch * size), previous(x.size());
    if (addresses_.count("previous_x0") != 0)
        std::memcpy(previous.data(), floats("previous_x0"), previous.size() * sizeof(float));
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t b = 0; b < batch; ++b) {
            const float* row = floats("coefficients") + columns * (loop ? step : b);
            const auto cond = static_cast<float>(integers("labels")[b]);
            const auto uncond = static_cast<float>(integers("uncond_labels")[b]);
            float label = uncond + floats("guidance_scale")[b] * (cond - uncond);
            if (!setting("FAKE_FLOATS", "").empty())
                label += (loop ? floats("timesteps")[step] : floats("timestep")[b]) / 1000.0F;
            for (std::size_t k = b * size; k < (b + 1) * size; ++k) {
                const float out = 0.1F * x[k] + label;
                const float x0 = row[0] * x[k] + row[1] * out;
                x[k] = row[2] * x[k] + row[3] * out + row[4] * x0;
                if (columns == 7) x[k] += row[6] * previous[k];
                previous[k] = x0;
                if (addresses_.count("noise") != 0) x[k] += row[5] * floats("noise")[step * batch * size + k];
            }
        }
    std::memcpy(floats(loop ? "samples" : "next_sample"), x.data(), x.size() * sizeof(float));
    if (addresses_.count("pred_original_sample") != 0)
        std::memcpy(floats("pred_original_sample"), previous.data(), previous.size() * sizeof(float));
}

}  // namespace nvinfer1
