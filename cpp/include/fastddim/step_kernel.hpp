// The fused DDIM step of a kernel bundle on an NVIDIA GPU, through the CUDA driver, which is loaded when it is asked for.
// Linux, 64 bit.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/kernel_bundle.hpp"
#include "fastddim/schedule.hpp"

namespace fastddim {

/// The CUDA driver is missing, or a call of it failed; the message has the call and the name of its error.
class CudaError : public std::runtime_error {
   public:
    explicit CudaError(const std::string& message, CUresult code = CUDA_ERROR_UNKNOWN)
        : std::runtime_error(message), code_(code) {}

    CUresult code() const noexcept { return code_; }

   private:
    CUresult code_;
};

#define FASTDDIM_STRING_OF(text) #text
#define FASTDDIM_STRING(text) FASTDDIM_STRING_OF(text)
// cuda.h renames some functions to their newest version, so the name is taken after that.
#define FASTDDIM_CALL(member, call) decltype(&::call) member = find<decltype(&::call)>(FASTDDIM_STRING(call));

/// The functions of the CUDA driver that are used here.
class Driver {
    std::string library_;
    void* handle_ = nullptr;

   public:
    /// Throws CudaError: there is no such library, it lacks a function, or it finds no GPU.
    explicit Driver(std::string library = "libcuda.so.1") : library_(std::move(library)), handle_(open(library_)) {
        check("cuInit", init(0));
    }

    /// The one of this process, loaded by the first call.
    static const Driver& shared() {
        static const Driver driver;
        return driver;
    }

    /// Throws CudaError unless a call succeeded.
    void check(const std::string& call, CUresult result) const {
        if (result == CUDA_SUCCESS) return;
        const char *name = nullptr, *text = nullptr;
        get_error_name(result, &name);
        get_error_string(result, &text);
        throw CudaError(call + ": " + (name == nullptr ? "error " + std::to_string(result) : name) + " (" +
                            (text == nullptr ? "unknown" : text) + ")",
                        result);
    }

    FASTDDIM_CALL(init, cuInit)
    FASTDDIM_CALL(get_error_name, cuGetErrorName)
    FASTDDIM_CALL(get_error_string, cuGetErrorString)
    FASTDDIM_CALL(device_get, cuDeviceGet)
    FASTDDIM_CALL(device_get_attribute, cuDeviceGetAttribute)
    FASTDDIM_CALL(context_retain, cuDevicePrimaryCtxRetain)
    FASTDDIM_CALL(context_release, cuDevicePrimaryCtxRelease)
    FASTDDIM_CALL(context_push, cuCtxPushCurrent)
    FASTDDIM_CALL(context_pop, cuCtxPopCurrent)
    FASTDDIM_CALL(synchronize, cuCtxSynchronize)
    FASTDDIM_CALL(mem_alloc, cuMemAlloc)
    FASTDDIM_CALL(mem_free, cuMemFree)
    FASTDDIM_CALL(mem_set, cuMemsetD8)
    FASTDDIM_CALL(upload, cuMemcpyHtoD)
    FASTDDIM_CALL(download, cuMemcpyDtoH)
    FASTDDIM_CALL(module_load, cuModuleLoadData)
    FASTDDIM_CALL(module_unload, cuModuleUnload)
    FASTDDIM_CALL(module_get_function, cuModuleGetFunction)
    FASTDDIM_CALL(function_set_attribute, cuFuncSetAttribute)
    FASTDDIM_CALL(launch_kernel, cuLaunchKernel)

   private:
    // Never closed: a driver does not survive that.
    static void* open(const std::string& library) {
        void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr)
            throw CudaError(std::string("CUDA driver: ") + dlerror() + "; install the NVIDIA driver");
        return handle;
    }

    template <class Call>
    Call find(const char* name) const {
        void* const address = dlsym(handle_, name);
        if (address == nullptr) throw CudaError("CUDA driver: " + library_ + " has no " + name + "; update the driver");
        return reinterpret_cast<Call>(address);
    }
};

#undef FASTDDIM_CALL
#undef FASTDDIM_STRING
#undef FASTDDIM_STRING_OF

/// A GPU and its primary context, which is the CUDA runtime's too. Outlives what is made with it.
class Device {
   public:
    explicit Device(int ordinal = 0, const Driver& driver = Driver::shared()) : driver_(&driver) {
        driver.check("cuDeviceGet of GPU " + std::to_string(ordinal), driver.device_get(&device_, ordinal));
        const auto attribute = [&](CUdevice_attribute which) {
            int value = 0;
            driver.check("cuDeviceGetAttribute", driver.device_get_attribute(&value, which, device_));
            return value;
        };
        major_ = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
        minor_ = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
        largest_shared_ = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
        driver.check("cuDevicePrimaryCtxRetain", driver.context_retain(&context_, device_));
    }

    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() { driver_->context_release(device_); }

    const Driver& driver() const noexcept { return *driver_; }
    int major() const noexcept { return major_; }
    int minor() const noexcept { return minor_; }
    int largest_shared() const noexcept { return largest_shared_; }

    /// Runs a call that frees something, for destructors, which cannot throw.
    template <class Call, class Handle>
    void release(Call call, Handle handle) const noexcept {
        CUcontext popped = nullptr;
        if (driver_->context_push(context_) != CUDA_SUCCESS) return;
        call(handle);
        driver_->context_pop(&popped);
    }

    /// Makes the device's context the thread's current one, until it goes out of scope.
    class Scope {
       public:
        explicit Scope(const Device& device) : driver_(device.driver_) {
            driver_->check("cuCtxPushCurrent", driver_->context_push(device.context_));
        }
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;
        ~Scope() {
            CUcontext popped = nullptr;
            driver_->context_pop(&popped);
        }

       private:
        const Driver* driver_;
    };

   private:
    const Driver* driver_;
    CUdevice device_ = 0;
    int major_ = 0, minor_ = 0, largest_shared_ = 0;
    CUcontext context_ = nullptr;
};

/// Memory of a device, zero at first.
class DeviceMemory {
   public:
    DeviceMemory(const Device& device, std::size_t bytes) : device_(&device), bytes_(bytes) {
        const Device::Scope scope(device);
        const Driver& driver = device.driver();
        driver.check("cuMemAlloc of " + std::to_string(bytes) + " bytes", driver.mem_alloc(&address_, bytes));
        CUresult result = driver.mem_set(address_, 0, bytes);
        // The other streams do not wait for it.
        if (result == CUDA_SUCCESS) result = driver.synchronize();
        if (result != CUDA_SUCCESS) {
            driver.mem_free(address_);
            driver.check("cuMemsetD8", result);
        }
    }

    DeviceMemory(DeviceMemory&& other) noexcept
        : device_(other.device_), bytes_(other.bytes_), address_(std::exchange(other.address_, 0)) {}
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    DeviceMemory& operator=(DeviceMemory&&) = delete;

    ~DeviceMemory() {
        if (address_ != 0) device_->release(device_->driver().mem_free, address_);
    }

    CUdeviceptr address() const noexcept { return address_; }
    std::size_t bytes() const noexcept { return bytes_; }

    /// Copies `bytes()` bytes from the host; returns when they are there.
    void upload(const void* from) {
        const Device::Scope scope(*device_);
        const Driver& driver = device_->driver();
        driver.check("cuMemcpyHtoD", driver.upload(address_, from, bytes_));
        // It may return before the device has what it took from pageable memory.
        driver.check("cuCtxSynchronize", driver.synchronize());
    }

    /// Copies `bytes()` bytes to the host, after what the default stream has been given.
    void download(void* to) const {
        const Device::Scope scope(*device_);
        device_->driver().check("cuMemcpyDtoH", device_->driver().download(to, address_, bytes_));
    }

   private:
    const Device* device_;
    std::size_t bytes_;
    CUdeviceptr address_ = 0;
};

/// A contiguous tensor in a device's memory; an address of 0 is none.
struct DeviceArray {
    CUdeviceptr address = 0;
    DType dtype = DType::float32;
    std::size_t size = 0;
};

/// What a step is called with, as `ddim_step` of Python has it: `kernel.json` says which of them, and their shapes.
struct StepArguments {
    DeviceArray model_output, sample, table, step, guidance_scale, guidance_rescale, noise, seeds, first_row, out, x0,
        model_input, timesteps, next_timestep;
};

namespace detail {

/// An argument of a step, by its name in `kernel.json`.
struct StepSlot {
    const char* name;
    DeviceArray StepArguments::*member;
};

inline constexpr std::array<StepSlot, 14> step_slots{{
    {"model_output", &StepArguments::model_output},
    {"sample", &StepArguments::sample},
    {"table", &StepArguments::table},
    {"step", &StepArguments::step},
    {"guidance_scale", &StepArguments::guidance_scale},
    {"guidance_rescale", &StepArguments::guidance_rescale},
    {"noise", &StepArguments::noise},
    {"seeds", &StepArguments::seeds},
    {"first_row", &StepArguments::first_row},
    {"out", &StepArguments::out},
    {"x0", &StepArguments::x0},
    {"model_input", &StepArguments::model_input},
    {"timesteps", &StepArguments::timesteps},
    {"next_timestep", &StepArguments::next_timestep},
}};

}  // namespace detail

/// A run's table of coefficients, its timesteps and the index of each row, on a device.
class DeviceTable {
   public:
    /// Throws std::invalid_argument: no steps; CudaError: what the driver says.
    DeviceTable(const Device& device, const StepTable& table)
        : size_(require_steps(table)),
          timestep_dtype_(table.float_timesteps ? DType::float32 : DType::int64),
          columns_(device, size_ * sizeof(StepCoefficients)),
          timesteps_(device, size_ * size_of(timestep_dtype_)),
          indices_(device, size_ * sizeof(std::int64_t)) {
        static_assert(sizeof(StepCoefficients) == 6 * sizeof(double));
        std::vector<std::int64_t> indices(size_);
        std::iota(indices.begin(), indices.end(), 0);
        columns_.upload(table.rows.data());
        timesteps_.upload(table.timestep_bytes().data());
        indices_.upload(indices.data());
    }

    DeviceArray columns() const noexcept { return {columns_.address(), DType::float64, 6 * size_}; }
    DeviceArray timesteps() const noexcept { return {timesteps_.address(), timestep_dtype_, size_}; }

    /// The index of a row; throws std::out_of_range where there is none.
    DeviceArray step(std::size_t row) const {
        if (row >= size_)
            throw std::out_of_range(detail::text("step: ", row, " is outside the table of ", size_, " steps"));
        return {indices_.address() + row * sizeof(std::int64_t), DType::int64, 1};
    }

   private:
    static std::size_t require_steps(const StepTable& table) {
        if (table.size() == 0 || table.timesteps.size() != table.size())
            throw std::invalid_argument(detail::text("table: ", table.timesteps.size(), " timesteps and ", table.size(),
                                                     " rows; pass as many of both, at least one"));
        if (table.looks_back())
            throw std::invalid_argument("table: it looks back at the previous x0, which the compiled step does not; pass "
                                        "one of first order, such as that of a DPMSolver with solver_order 1");
        return table.size();
    }

    std::size_t size_;
    DType timestep_dtype_;
    DeviceMemory columns_, timesteps_, indices_;
};

/// The kernels of a step for one batch size, loaded on a device. It owns their scratch memory, so its launches belong to
/// one stream at a time; without scratch memory several threads and streams may launch.
class StepKernel {
   public:
    /// bundle: what `open_kernels` gives.
    /// batch: one of the sizes that it was exported for.
    ///
    /// Throws std::invalid_argument: another size; BundleError: a damaged bundle, or no code for this GPU; CudaError: what
    /// the driver says.
    StepKernel(const Device& device, const KernelBundle& bundle, std::int64_t batch)
        : device_(&device), plan_(find_plan(bundle, batch)) {
        const Device::Scope scope(device);
        for (const auto& [name, bytes] : plan_.scratch) scratch_.emplace(name, DeviceMemory(device, bytes));
        for (const auto& [name, shape] : plan_.shapes) {
            const Slot* slot = find_slot(name);
            if (slot == nullptr)
                throw BundleError("bundle: '" + bundle.path.string() + "' has an argument '" + name +
                                  "' that this fastddim does not know; update it");
            const KernelManifest::Argument& argument = bundle.manifest.arguments.at(name);
            Expected& expected = expected_[static_cast<std::size_t>(slot - slots.data())];
            expected = {true, argument.written, argument.dtype, shape, static_cast<std::int64_t>(size_of(argument.dtype))};
        }
        std::map<std::string, CUfunction> functions;
        for (const KernelManifest::Launch& launch : plan_.launches) {
            const KernelManifest::Kernel& kernel = bundle.manifest.kernels.at(launch.kernel);
            const KernelManifest::Image& image = find_image(bundle, kernel);
            if (functions.count(launch.kernel) == 0) functions[launch.kernel] = load(bundle, kernel, image);
            launches_.push_back(bind(kernel, launch, functions.at(launch.kernel), image.shared_bytes));
        }
    }

    StepKernel(const StepKernel&) = delete;
    StepKernel& operator=(const StepKernel&) = delete;

    /// `"elements"`, `"whole"` or `"statistics"`.
    const std::string& tier() const noexcept { return plan_.tier; }

    /// Launches the step; returns before it is done, and may be captured in a graph.
    ///
    /// Throws std::invalid_argument: arguments that these kernels do not take; CudaError: what the driver says.
    void launch(CUstream stream, const StepArguments& arguments) const {
        check(arguments);
        const auto num_steps = static_cast<std::int64_t>(arguments.table.size / 6);
        const Device::Scope scope(*device_);
        for (const Bound& bound : launches_) {
            std::array<std::uint64_t, max_parameters> values{};
            std::array<void*, max_parameters> pointers{};
            for (std::size_t k = 0; k < bound.parameters.size(); ++k) {
                const Source& source = bound.parameters[k];
                std::uint64_t value = source.value;
                if (source.slot != no_slot) value = (arguments.*slots[source.slot].member).address;
                if (source.num_steps) value = static_cast<std::uint64_t>(num_steps);
                // The first bytes are the number's low ones on every machine that has CUDA.
                values[k] = value;
                pointers[k] = &values[k];
            }
            const auto& [x, y, z] = bound.grid;
            const Driver& driver = device_->driver();
            driver.check("cuLaunchKernel",
                         driver.launch_kernel(bound.function, x, y, z, bound.threads, 1, 1, bound.shared_bytes, stream,
                                              pointers.data(), nullptr));
        }
    }

   private:
    static constexpr std::size_t max_parameters = 32;
    using Slot = detail::StepSlot;
    static constexpr const auto& slots = detail::step_slots;
    static constexpr std::size_t num_slots = slots.size();
    static constexpr std::size_t no_slot = num_slots;
    // What a kernel may have without asking for more.
    static constexpr unsigned plain_shared_bytes = 48 * 1024;

    /// What an argument has to be.
    struct Expected {
        bool given = false;
        bool written = false;
        DType dtype = DType::float32;
        std::vector<Dim> shape;
        std::int64_t divisible_by = 1;
    };

    /// Where a parameter's value comes from: an argument, the table's length, or it is fixed.
    struct Source {
        std::size_t slot = no_slot;
        bool num_steps = false;
        std::uint64_t value = 0;
    };

    struct Bound {
        CUfunction function = nullptr;
        std::array<unsigned, 3> grid{};
        unsigned threads = 0;
        unsigned shared_bytes = 0;
        std::vector<Source> parameters;
    };

    class Module {
       public:
        Module(const Device& device, CUmodule module) : device_(&device), module_(module) {}
        Module(Module&& other) noexcept : device_(other.device_), module_(std::exchange(other.module_, nullptr)) {}
        Module(const Module&) = delete;
        Module& operator=(const Module&) = delete;
        Module& operator=(Module&&) = delete;
        ~Module() {
            if (module_ != nullptr) device_->release(device_->driver().module_unload, module_);
        }

       private:
        const Device* device_;
        CUmodule module_;
    };

    static const Slot* find_slot(const std::string& name) noexcept {
        for (const Slot& slot : slots)
            if (name == slot.name) return &slot;
        return nullptr;
    }

    static const KernelManifest::Plan& find_plan(const KernelBundle& bundle, std::int64_t batch) {
        const auto& plans = bundle.manifest.plans;
        const auto found = plans.find(batch);
        if (found != plans.end()) return found->second;
        std::string sizes;
        for (const auto& [size, plan] : plans) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
        throw std::invalid_argument(detail::text("batch: ", batch, "; '", bundle.path.string(), "' has kernels for ", sizes,
                                                 "; export it with --batch ", batch));
    }

    /// The code for this GPU, or else the PTX.
    const KernelManifest::Image& find_image(const KernelBundle& bundle, const KernelManifest::Kernel& kernel) const {
        const KernelManifest::Image* best = nullptr;
        std::string targets;
        for (const KernelManifest::Image& image : kernel.images) {
            targets += (targets.empty() ? "" : ", ") + image.target + (image.ptx ? " (PTX)" : "");
            if (image.runs_on(device_->major(), device_->minor()) && (best == nullptr || best->ptx)) best = &image;
        }
        if (best == nullptr)
            throw BundleError(detail::text("bundle: '", bundle.path.string(), "' has kernels for ", targets,
                                           "; none runs on this GPU of compute capability ", device_->major(), ".",
                                           device_->minor(), "; export it again, or pass another Device"));
        return *best;
    }

    CUfunction load(const KernelBundle& bundle, const KernelManifest::Kernel& kernel, const KernelManifest::Image& image) {
        const Driver& driver = device_->driver();
        const std::string code = bundle.read(image.file);
        const std::string file = "'" + (bundle.path / image.file).string() + "'";
        if (image.shared_bytes > static_cast<unsigned>(device_->largest_shared()))
            throw BundleError(detail::text("bundle: ", file, " needs ", image.shared_bytes,
                                           " bytes of shared memory, this GPU has ", device_->largest_shared(),
                                           "; export it again, or pass another Device"));
        CUmodule module = nullptr;
        driver.check("cuModuleLoadData of " + file, driver.module_load(&module, code.c_str()));
        modules_.emplace_back(*device_, module);
        CUfunction function = nullptr;
        driver.check("cuModuleGetFunction of '" + kernel.entry + "' in " + file,
                     driver.module_get_function(&function, module, kernel.entry.c_str()));
        if (image.shared_bytes > plain_shared_bytes)
            driver.check("cuFuncSetAttribute of " + file,
                         driver.function_set_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                       static_cast<int>(image.shared_bytes)));
        return function;
    }

    Bound bind(const KernelManifest::Kernel& kernel, const KernelManifest::Launch& launch, CUfunction function,
               unsigned shared_bytes) {
        if (kernel.parameters.size() > max_parameters)
            throw BundleError("bundle: '" + launch.kernel + "' has " + std::to_string(kernel.parameters.size()) +
                              " parameters; update fastddim");
        Bound bound{function, launch.grid, 32 * kernel.num_warps, shared_bytes, {}};
        for (const KernelManifest::Parameter& parameter : kernel.parameters) {
            Source source;
            const Slot* slot = find_slot(parameter.name);
            if (!parameter.pointer) {
                source.num_steps = parameter.name == "num_steps";
                if (!source.num_steps) source.value = static_cast<std::uint64_t>(launch.numbers.at(parameter.name));
            } else if (slot != nullptr) {
                source.slot = static_cast<std::size_t>(slot - slots.data());
                // Both are powers of two.
                std::int64_t& divisor = expected_[source.slot].divisible_by;
                divisor = std::max(divisor, parameter.divisible_by);
            } else if (scratch_.count(parameter.name) != 0) {
                source.value = scratch_.at(parameter.name).address();
            }
            bound.parameters.push_back(source);
        }
        return bound;
    }

    [[noreturn]] static void refuse(const char* name, const std::string& what) {
        throw std::invalid_argument(std::string(name) + ": " + what);
    }

    void check(const StepArguments& arguments) const {
        const std::size_t num_steps = arguments.table.size / 6;
        if (num_steps > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
            refuse("table", detail::text(num_steps, " steps; pass fewer than 2**31"));
        for (std::size_t k = 0; k < num_slots; ++k) {
            const Slot& slot = slots[k];
            const DeviceArray& array = arguments.*slot.member;
            const Expected& expected = expected_[k];
            if (!expected.given) {
                if (array.address != 0) refuse(slot.name, "given, but these kernels do not take it; leave it out");
                continue;
            }
            if (array.address == 0) refuse(slot.name, "not given; pass " + wanted(expected));
            if (array.dtype != expected.dtype || !has_size(array, expected, num_steps))
                refuse(slot.name, detail::text(array.size, " elements of ", name_of(array.dtype), "; pass ", wanted(expected)));
            if (array.address % static_cast<std::uint64_t>(expected.divisible_by) != 0)
                refuse(slot.name, detail::text("its address is no multiple of ", expected.divisible_by,
                                               " bytes, which these kernels rely on; pass memory that is aligned"));
        }
        for (std::size_t k = 0; k < num_slots; ++k)
            if (expected_[k].written) check_overlaps(arguments, k);
    }

    /// Whether an array has as many elements as it has to, found without a product that overflows.
    static bool has_size(const DeviceArray& array, const Expected& expected, std::size_t num_steps) noexcept {
        std::size_t count = 1;
        for (const Dim& dim : expected.shape) {
            const std::size_t size = dim.fixed() ? static_cast<std::size_t>(dim.size) : num_steps;
            if (size == 0 || size > array.size / count) return false;
            count *= size;
        }
        return count == array.size;
    }

    /// Refuses a result in memory that something else is in, but for `out` on a state that is read element for element.
    void check_overlaps(const StepArguments& arguments, std::size_t written) const {
        const Slot& slot = slots[written];
        const auto [start, end] = span(arguments.*slot.member);
        for (std::size_t k = 0; k < num_slots; ++k) {
            const auto [other_start, other_end] = span(arguments.*slots[k].member);
            if (k == written || start >= other_end || other_start >= end) continue;
            const std::string name = slot.name, other = slots[k].name;
            const bool in_place = name == "out" && (other == "sample" || other == "model_output") &&
                                  (arguments.*slot.member).size == (arguments.*slots[k].member).size;
            if (in_place && start == other_start && end == other_end) continue;
            refuse(slot.name, "shares memory with " + other + "; pass memory of its own");
        }
    }

    static std::pair<std::uint64_t, std::uint64_t> span(const DeviceArray& array) noexcept {
        return {array.address, array.address + array.size * size_of(array.dtype)};
    }

    /// "float32 [4, 3, 64, 64]"
    static std::string wanted(const Expected& expected) {
        std::string sizes;
        for (const Dim& dim : expected.shape)
            sizes += (sizes.empty() ? "" : ", ") + (dim.fixed() ? std::to_string(dim.size) : dim.name);
        return std::string(name_of(expected.dtype)) + " [" + sizes + "]";
    }

    const Device* device_;
    KernelManifest::Plan plan_;
    std::map<std::string, DeviceMemory> scratch_;
    std::array<Expected, num_slots> expected_{};
    std::vector<Module> modules_;
    std::vector<Bound> launches_;
};

}  // namespace fastddim
