// As much of TensorRT as TrtSampler calls. Every engine is the same: fake_tensorrt.cpp says which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

struct Dims {
    static constexpr std::int32_t MAX_DIMS = 8;
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kINT64 = 8 };

class ILogger {
   public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
   public:
    explicit IExecutionContext(ILogger& logger) : logger_(&logger) {}
    bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept;
    bool setInputShape(const char* name, const Dims& dims) noexcept;
    bool setTensorAddress(const char* name, void* data) noexcept;
    std::int32_t inferShapes(std::int32_t count, const char** names) noexcept;
    Dims getTensorShape(const char* name) const noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;

   private:
    bool told(const std::string& call) noexcept;
    void compute() const noexcept;

    ILogger* logger_;
    std::map<std::string, Dims> shapes_;
    std::map<std::string, void*> addresses_;
};

class ICudaEngine {
   public:
    explicit ICudaEngine(ILogger& logger) : logger_(&logger) {}
    IExecutionContext* createExecutionContext() noexcept;
    DataType getTensorDataType(const char* name) const noexcept;

   private:
    ILogger* logger_;
};

class IRuntime {
   public:
    explicit IRuntime(ILogger& logger) : logger_(&logger) {}
    void setEngineHostCodeAllowed(bool allowed) noexcept;
    ICudaEngine* deserializeCudaEngine(const void* data, std::size_t bytes) noexcept;

   private:
    ILogger* logger_;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

std::int32_t getInferLibMajorVersion() noexcept;
std::int32_t getInferLibMinorVersion() noexcept;
std::int32_t getInferLibPatchVersion() noexcept;
