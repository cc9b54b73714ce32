// A kernel bundle: the folder that `fastddim export cubin` writes, as its kernel.json describes it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/sha256.hpp"

namespace fastddim {

enum class DType { float32, float16, bfloat16, float64, int64, int32 };

inline std::size_t size_of(DType dtype) noexcept {
    return dtype == DType::float64 || dtype == DType::int64 ? 8 : dtype == DType::float32 || dtype == DType::int32 ? 4 : 2;
}

inline const char* name_of(DType dtype) noexcept {
    static constexpr std::array<const char*, 6> names{"float32", "float16", "bfloat16", "float64", "int64", "int32"};
    return names[static_cast<std::size_t>(dtype)];
}

/// What `kernel.json` says; its fields are those of fastddim/export/kernel.schema.json.
struct KernelManifest {
    struct Argument {
        DType dtype = DType::float32;
        bool written = false;
    };

    struct Parameter {
        std::string name;
        bool pointer = false;
        /// A number's size: 4 or 8.
        std::size_t bytes = 8;
        std::int64_t divisible_by = 1;
    };

    struct Image {
        bool ptx = false;
        std::string target;
        std::int64_t major = 0;
        std::int64_t minor = 0;
        std::string file;
        unsigned shared_bytes = 0;

        /// Whether it is code for a GPU, or PTX that its driver can compile.
        bool runs_on(std::int64_t device_major, std::int64_t device_minor) const noexcept {
            const bool exact = target.back() < '0' || target.back() > '9';
            if (exact) return device_major == major && device_minor == minor;
            return (device_major == major && device_minor >= minor) || (ptx && device_major > major);
        }
    };

    struct Kernel {
        std::string entry;
        std::vector<Parameter> parameters;
        unsigned num_warps = 1;
        std::vector<Image> images;
    };

    struct Launch {
        std::string kernel;
        std::array<unsigned, 3> grid{};
        std::map<std::string, std::int64_t> numbers;
    };

    /// The launches of a step for a batch size.
    struct Plan {
        std::string tier;
        /// A dimension without a fixed size is the number of steps.
        std::map<std::string, std::vector<Dim>> shapes;
        std::map<std::string, std::size_t> scratch;
        std::vector<Launch> launches;
    };

    static constexpr std::int64_t newest_format_version = 1;

    std::map<std::string, Argument> arguments;
    std::map<std::string, Kernel> kernels;
    std::map<std::int64_t, Plan> plans;
    std::map<std::string, Manifest::File> files;
};

namespace detail {

inline KernelManifest::Kernel parse_kernel(const Field& field, const KernelManifest& manifest) {
    KernelManifest::Kernel kernel;
    kernel.entry = field.at("entry").string();
    kernel.num_warps = static_cast<unsigned>(field.at("num_warps").integer(1, 32));
    for (const Field& item : field.at("parameters").items()) {
        KernelManifest::Parameter parameter;
        parameter.name = item.at("name").string();
        const std::size_t type = item.at("type").choice({"int32", "int64", "float32*", "float16*", "bfloat16*",
                                                         "float64*", "int64*", "int32*", "uint8*"});
        parameter.pointer = type > 1;
        parameter.bytes = type == 0 ? 4 : 8;
        const Field divisible_by = item.at("divisible_by");
        parameter.divisible_by = divisible_by.integer(1);
        if ((parameter.divisible_by & (parameter.divisible_by - 1)) != 0)
            divisible_by.fail(divisible_by.shown() + " is no power of two");
        kernel.parameters.push_back(std::move(parameter));
    }
    for (const Field& item : field.at("images").items()) {
        KernelManifest::Image image;
        image.ptx = item.at("kind").choice({"cubin", "ptx"}) == 1;
        image.target = item.at("target").string();
        if (image.target.empty()) item.at("target").fail("an empty name");
        const std::vector<Field> capability = item.at("compute_capability").items();
        if (capability.size() != 2) item.at("compute_capability").fail("not a major and a minor number");
        image.major = capability[0].integer(0);
        image.minor = capability[1].integer(0);
        image.file = item.at("file").string();
        image.shared_bytes = static_cast<unsigned>(item.at("shared_bytes").integer(0, std::numeric_limits<int>::max()));
        if (manifest.files.count(image.file) == 0)
            item.at("file").fail("no file " + item.at("file").shown() + " among 'files'");
        kernel.images.push_back(std::move(image));
    }
    return kernel;
}

inline KernelManifest::Launch parse_launch(const Field& field, const KernelManifest& manifest,
                                           const KernelManifest::Plan& plan) {
    KernelManifest::Launch launch;
    launch.kernel = field.at("kernel").string();
    const std::vector<Field> grid = field.at("grid").items();
    if (grid.size() != launch.grid.size()) field.at("grid").fail("not three numbers");
    for (std::size_t k = 0; k < grid.size(); ++k)
        launch.grid[k] = static_cast<unsigned>(grid[k].integer(1, std::numeric_limits<int>::max()));
    for (const auto& [name, value] : field.at("numbers").members())
        launch.numbers[name] = value.integer(std::numeric_limits<std::int64_t>::min());
    const auto kernel = manifest.kernels.find(launch.kernel);
    if (kernel == manifest.kernels.end()) field.at("kernel").fail("no kernel " + field.at("kernel").shown());
    for (const KernelManifest::Parameter& parameter : kernel->second.parameters) {
        const std::string& name = parameter.name;
        const bool hidden = name == "global_scratch" || name == "profile_scratch";
        const bool known = parameter.pointer ? hidden || plan.shapes.count(name) != 0 || plan.scratch.count(name) != 0
                                             : name == "num_steps" || launch.numbers.count(name) != 0;
        if (!known) field.fail("nothing for the parameter '" + name + "' of '" + launch.kernel + "'");
        if (!parameter.pointer && name != "num_steps") {
            const std::int64_t number = launch.numbers.at(name);
            if (parameter.bytes == 4 && (number < std::numeric_limits<std::int32_t>::min() ||
                                         number > std::numeric_limits<std::int32_t>::max()))
                field.at("numbers").fail("'" + name + "' is no int32");
            if (number % parameter.divisible_by != 0)
                field.at("numbers").fail("'" + name + "' is no multiple of " + std::to_string(parameter.divisible_by));
        }
    }
    return launch;
}

inline KernelManifest::Plan parse_plan(const Field& field, const KernelManifest& manifest) {
    KernelManifest::Plan plan;
    plan.tier = field.at("tier").string();
    for (const auto& [name, shape] : field.at("shapes").members()) {
        if (manifest.arguments.count(name) == 0) shape.fail("no '" + name + "' among 'arguments'");
        constexpr std::int64_t most = std::int64_t{1} << 40;
        std::int64_t count = 1;
        std::vector<Dim>& dims = plan.shapes[name];
        for (const Field& dim : shape.items()) {
            if (dim.is_string() && dim.string() != "num_steps") dim.fail(dim.shown() + " is not 'num_steps'");
            dims.push_back(dim.is_string() ? Dim{0, "num_steps"} : Dim{dim.integer(1), ""});
            if (!dims.back().fixed()) continue;
            if (dims.back().size > most / count) shape.fail("has more than 2**40 elements");
            count *= dims.back().size;
        }
    }
    for (const char* name : {"table", "step", "model_output", "sample", "out"})
        if (plan.shapes.count(name) == 0) field.at("shapes").fail(std::string("'") + name + "' is a required property");
    for (const auto& [name, bytes] : field.at("scratch").members())
        plan.scratch[name] = static_cast<std::size_t>(bytes.integer(1));
    for (const Field& item : field.at("launches").items()) plan.launches.push_back(parse_launch(item, manifest, plan));
    if (plan.launches.empty()) field.at("launches").fail("no launch");
    return plan;
}

}  // namespace detail

/// Reads and checks the text of a `kernel.json`; `file` is its name in messages.
///
/// Throws BundleError: it is none, one of a newer format, or one that lacks what the format promises.
inline KernelManifest parse_kernel_manifest(const std::string& text, const std::string& file = "kernel.json") {
    const nlohmann::json json = detail::parse_json(text, file, "fastddim-kernels",
                                                   KernelManifest::newest_format_version, "fastddim export cubin");
    const detail::Field root(json, file);
    KernelManifest manifest;
    manifest.files = detail::parse_files(root.at("files"), file);
    for (const auto& [name, entry] : root.at("arguments").members())
        manifest.arguments[name] = {static_cast<DType>(entry.at("dtype").choice(
                                        {"float32", "float16", "bfloat16", "float64", "int64", "int32"})),
                                    entry.at("written").boolean()};
    for (const detail::Field& item : root.at("kernels").items())
        manifest.kernels[item.at("name").string()] = detail::parse_kernel(item, manifest);
    for (const detail::Field& item : root.at("plans").items())
        manifest.plans[item.at("batch").integer(1)] = detail::parse_plan(item, manifest);
    return manifest;
}

/// An opened kernel bundle. Its files are checked when they are read.
struct KernelBundle {
    std::filesystem::path path;
    KernelManifest manifest;

    /// A file's bytes; throws BundleError where they are not those that were exported.
    std::string read(const std::string& file) const {
        const Manifest::File& expected = manifest.files.at(file);
        detail::check_file(path, file, expected, false);
        std::string content = detail::read_all(path / file);
        Sha256 digest;
        digest.update(content.data(), content.size());
        if (digest.hex() != expected.sha256)
            throw BundleError("bundle: '" + (path / file).string() +
                              "' is not the file that was exported (SHA-256); export it again");
        return content;
    }
};

/// Reads and checks the description of a kernel bundle.
///
/// Throws BundleError: no kernel bundle, or one of a newer format.
inline KernelBundle open_kernels(const std::filesystem::path& folder) {
    const std::filesystem::path file = folder / "kernel.json";
    std::error_code failed;
    if (!std::filesystem::is_regular_file(file, failed))
        throw BundleError("bundle: '" + file.string() +
                          "' is missing; pass a folder that `fastddim export cubin` wrote");
    return {folder, parse_kernel_manifest(detail::read_all(file), file.string())};
}

}  // namespace fastddim
