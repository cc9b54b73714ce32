// A bundle: the folder that `fastddim export` writes. Its manifest is read and checked, and its files against it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "fastddim/samplers.hpp"
#include "fastddim/schedule.hpp"
#include "fastddim/sha256.hpp"

namespace fastddim {

/// A bundle that cannot be read; the message names the file, where in it, and what is wrong.
class BundleError : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

/// One dimension of an input or output: its size, or a name where it may differ from call to call.
struct Dim {
    std::int64_t size = 0;
    std::string name;

    bool fixed() const noexcept { return name.empty(); }
};

/// An input or output of the graph; `dtype` as numpy names it.
struct TensorInfo {
    std::string name;
    std::string dtype;
    std::vector<Dim> shape;
    std::string meaning;
};

/// What `manifest.json` says; its fields are those of fastddim/export/manifest.schema.json.
struct Manifest {
    struct File {
        std::string sha256;
        std::uint64_t bytes = 0;
    };

    /// What keeps the predicted x0 in range; it is fixed in the graph.
    struct Limit {
        /// `clip` to [-bound, bound], or `threshold`, the dynamic one of at most `bound`.
        std::string kind;
        double bound = 1;
        /// The quantile of a threshold.
        double ratio = 1;
    };

    struct Sampling {
        bool guided = false;
        bool guidance_rescale = false;
        bool stochastic = false;
        bool baked_schedule = false;
        /// Whether the graph takes a seed for each sample instead of the starting state and noise.
        bool seeded = false;
        std::string dtype;
        std::optional<Limit> limit;
        std::map<std::string, std::int64_t> null_values;
    };

    struct Sample {
        std::vector<std::int64_t> shape;
        std::string layout;
        std::optional<std::array<double, 2>> range;
    };

    /// A graph beside the sampler's: a text encoder or a decoder of a whole pipeline, or what runs before the steps.
    struct Component {
        std::string model;
        std::vector<TensorInfo> inputs;
        std::vector<TensorInfo> outputs;
        std::string meaning;
        /// A decoder's pixels for each of a latent, along a side.
        std::optional<std::int64_t> upscale;
    };

    /// The machines that compiled files run on.
    struct Target {
        std::string device;
        std::string platform;
        std::string machine;
        /// As Linux names them, without underscores.
        std::vector<std::string> cpu_features;
        /// The GPU's, such as 9.0.
        std::string compute_capability;
    };

    /// What TensorRT engines were built with and for.
    struct Engine {
        /// `standard` or `rtx`.
        std::string flavour;
        std::string version;
        /// The GPUs', such as 8.9; all that the flavour has where it is empty.
        std::vector<std::string> compute_capabilities;
        /// For each optimisation profile, the least, best and largest size of each named dimension.
        std::vector<std::map<std::string, std::array<std::int64_t, 3>>> profiles;
        bool version_compatible = false;
        bool ampere_plus = false;
        bool strip_plan = false;
    };

    /// A robot policy: what a chunk of its actions is made of.
    struct Policy {
        struct Observation {
            std::string name;
            /// Pictures, uint8 or in [0, 1].
            bool image = false;
            /// Of one moment.
            std::vector<std::int64_t> shape;
        };

        std::vector<Observation> observations;
        std::int64_t n_obs_steps = 1, horizon = 1, n_action_steps = 1, first_action = 0, action_dim = 1;
        /// Whether known actions and a mask of them are inputs.
        bool committed = false;
        /// Of control, in Hz.
        std::optional<double> rate;
    };

    static constexpr std::int64_t newest_format_version = 3;

    /// `loop`: all steps in one call; `step`: one step a call.
    std::string kind;
    /// What runs the file, such as `onnx`, `aoti` or `tensorrt`; each runtime's sampler takes its own.
    std::string runtime;
    std::optional<Target> target;
    std::optional<Engine> engine;
    std::string model;
    std::map<std::string, File> files;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
    /// What computes values for all steps of a run, of which a file of one step takes rows; none but for such a file.
    std::optional<Component> before;
    std::optional<Policy> policy;
    /// The schedule and the method that tables are made by; none in a bundle made from a table.
    std::optional<fastddim::Sampling> scheduling;
    Sampling sampling;
    /// The default run.
    StepTable table;
    Sample sample;
    /// By name; none but for a whole pipeline.
    std::map<std::string, Component> components;
    /// In a whole pipeline no negative prompt means embeddings of zeros.
    bool zeros_for_empty_prompt = false;
    std::map<std::string, std::string> versions;

    const TensorInfo* find_input(std::string_view name) const noexcept { return find(inputs, name); }
    const TensorInfo* find_output(std::string_view name) const noexcept { return find(outputs, name); }
    /// An input of the graph, or of the one before the steps.
    const TensorInfo* find_taken(std::string_view name) const noexcept {
        const TensorInfo* const own = find_input(name);
        return own != nullptr || !before ? own : find(before->inputs, name);
    }

    /// What the model is conditioned on, but for the unconditional halves.
    std::vector<const TensorInfo*> conditions() const;

    /// The most steps that a run can have.
    std::int64_t most_steps() const noexcept {
        // A baked schedule of another method than DDIM keeps the tables of so many steps.
        constexpr std::int64_t most_kept = 100;
        if (!scheduling) return static_cast<std::int64_t>(table.size());
        const bool kept = sampling.baked_schedule && !std::holds_alternative<DDIM>(scheduling->method);
        return kept ? std::min(most_kept, scheduling->most_steps()) : scheduling->most_steps();
    }

    /// The input for timesteps; none where the schedule is baked.
    const TensorInfo* timestep_input() const noexcept {
        const TensorInfo* const own = find_input("timestep");
        return own != nullptr ? own : find_taken("timesteps");
    }

   private:
    static const TensorInfo* find(const std::vector<TensorInfo>& infos, std::string_view name) noexcept {
        for (const TensorInfo& info : infos)
            if (info.name == name) return &info;
        return nullptr;
    }
};

namespace detail {

/// A value in a manifest, which knows where it is: what it should not be becomes a BundleError.
class Field {
   public:
    using Json = nlohmann::json;

    Field(const Json& value, const std::string& file, std::string path = "$")
        : value_(&value), file_(&file), path_(std::move(path)) {}

    [[noreturn]] void fail(const std::string& what) const {
        throw BundleError("bundle: '" + *file_ + "': " + path_ + ": " + what + "; export it again");
    }

    std::string shown() const {
        std::string text = value_->dump(-1, ' ', true, Json::error_handler_t::replace);
        return text.size() <= 60 ? text : text.substr(0, 57) + "...";
    }

    std::optional<Field> find(const std::string& name) const {
        require(value_->is_object(), "an object");
        const auto found = value_->find(name);
        if (found == value_->end()) return std::nullopt;
        return Field(*found, *file_, path_ + "." + name);
    }

    Field at(const std::string& name) const {
        const std::optional<Field> found = find(name);
        if (!found) fail("'" + name + "' is a required property");
        return *found;
    }

    std::vector<std::pair<std::string, Field>> members() const {
        require(value_->is_object(), "an object");
        std::vector<std::pair<std::string, Field>> all;
        for (const auto& [name, value] : value_->items())
            all.emplace_back(name, Field(value, *file_, path_ + "['" + name + "']"));
        return all;
    }

    std::vector<Field> items() const {
        require(value_->is_array(), "an array");
        std::vector<Field> all;
        for (std::size_t k = 0; k < value_->size(); ++k)
            all.emplace_back((*value_)[k], *file_, path_ + "[" + std::to_string(k) + "]");
        return all;
    }

    bool is_null() const { return value_->is_null(); }
    bool is_string() const { return value_->is_string(); }
    bool is_float() const { return value_->is_number_float(); }

    bool boolean() const {
        require(value_->is_boolean(), "true or false");
        return value_->get<bool>();
    }

    double number() const {
        require(value_->is_number(), "a number");
        return value_->get<double>();
    }

    const std::string& string() const {
        require(value_->is_string(), "a string");
        return value_->get_ref<const std::string&>();
    }

    std::int64_t integer(std::int64_t low, std::int64_t high = std::numeric_limits<std::int64_t>::max()) const {
        const bool fits = value_->is_number_unsigned()
                              ? value_->get<std::uint64_t>() <=
                                    static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())
                              : value_->is_number_integer();
        require(fits, "an integer");
        const auto value = value_->get<std::int64_t>();
        const bool bounded = high != std::numeric_limits<std::int64_t>::max();
        if (value < low || value > high)
            fail(std::to_string(value) + " is not " +
                 (bounded ? "in [" + std::to_string(low) + ", " + std::to_string(high) + "]"
                          : ">= " + std::to_string(low)));
        return value;
    }

    /// The index of a string in a list of names.
    std::size_t choice(const std::vector<const char*>& names) const {
        const std::string& value = string();
        std::string listed;
        std::size_t index = 0;
        for (const char* name : names) {
            if (value == name) return index;
            listed += (index++ == 0 ? "'" : ", '") + std::string(name) + "'";
        }
        fail(shown() + " is not one of " + listed);
    }

   private:
    void require(bool holds, const char* what) const {
        if (!holds) fail(shown() + " is not " + what);
    }

    const Json* value_;
    const std::string* file_;
    std::string path_;
};

/// The JSON of a manifest; throws BundleError unless it is of the format, and of a version that is known here. `command`
/// is what writes the format.
inline nlohmann::json parse_json(const std::string& text, const std::string& file, const char* format,
                                 std::int64_t newest_version, const std::string& command) {
    // More than any manifest has; what is nested deeper would exhaust the stack where it is shown.
    constexpr int most_nested = 32;
    const auto fail = [&](const std::string& what) {
        throw BundleError("bundle: '" + file + "' cannot be read: " + what + "; export it again");
    };
    const auto watch = [&](int depth, nlohmann::json::parse_event_t, const nlohmann::json&) {
        if (depth > most_nested) fail("nested deeper than " + std::to_string(most_nested));
        return true;
    };
    // The parser would end there.
    if (text.find('\0') != std::string::npos) fail("a NUL byte");
    nlohmann::json json;
    try {
        json = nlohmann::json::parse(text, watch);
    } catch (const nlohmann::json::exception& error) {
        fail(error.what());
    }
    const auto found = json.find("format");
    if (found == json.end() || *found != format)
        throw BundleError("bundle: '" + file + "' is no manifest of a fastddim bundle; pass what `fastddim export` wrote");
    const Field field = Field(json, file).at("format_version");
    const std::int64_t version = field.integer(std::numeric_limits<std::int64_t>::min());
    if (version >= 1 && version <= newest_version) return json;
    throw BundleError("bundle: '" + file + "' has format_version " + std::to_string(version) + ", this fastddim reads " +
                      (version < 1 ? "from 1 " : "") + "up to " + std::to_string(newest_version) +
                      (version < 1 ? "; write it anew: `" + command + " --out ...`" : "; update fastddim"));
}

/// A file's path in a bundle, as the manifest names it; BundleError where it leads out.
inline std::filesystem::path inside(const std::string& file, const std::string& name) {
    const std::filesystem::path path(name);
    bool leads_out = path.is_absolute() || name.find('\\') != std::string::npos || name.find('\0') != std::string::npos;
    for (const std::filesystem::path& part : path) leads_out = leads_out || part == "..";
    if (leads_out)
        throw BundleError("bundle: '" + file + "' names '" + name.c_str() +
                          "', which leads out of the folder; export it again");
    return path;
}

inline std::map<std::string, Manifest::File> parse_files(const Field& field, const std::string& file) {
    std::map<std::string, Manifest::File> files;
    for (const auto& [name, entry] : field.members()) {
        inside(file, name);
        files[name] = {entry.at("sha256").string(), static_cast<std::uint64_t>(entry.at("bytes").integer(0))};
    }
    return files;
}

/// What reads a field of an object into a variable.
using Reader = std::function<void(const Field&)>;

inline Reader reads(bool& to) { return [&to](const Field& field) { to = field.boolean(); }; }
inline Reader reads(double& to) { return [&to](const Field& field) { to = field.number(); }; }
inline Reader reads(std::int64_t& to, std::int64_t low = 0) {
    return [&to, low](const Field& field) { to = field.integer(low); };
}
inline Reader reads(std::optional<double>& to) {
    return [&to](const Field& field) { to = field.is_null() ? std::nullopt : std::optional<double>(field.number()); };
}
/// One of the names of an enumeration, in its order.
template <class Enumeration>
Reader reads(Enumeration& to, std::vector<const char*> names) {
    return [&to, names](const Field& field) { to = static_cast<Enumeration>(field.choice(names)); };
}

/// Reads an object's fields; those that it lacks stay as they are, and one without a reader is no field of `what`.
inline void read_fields(const Field& object, const std::string& what, const std::map<std::string, Reader>& readers) {
    for (const auto& [name, value] : object.members()) {
        if (name.rfind('_', 0) == 0) continue;
        const auto reader = readers.find(name);
        if (reader == readers.end()) object.fail("'" + name + "' is no " + what);
        reader->second(value);
    }
}

inline const std::vector<const char*> spacing_names{"karras", "exponential", "beta", "uniform", "align_your_steps_sd15",
                                                    "align_your_steps_sdxl", "align_your_steps_svd"};
inline const std::vector<const char*> final_sigmas_names{"zero", "sigma_min"};

inline DDIMConfig parse_betas(const Field& field) {
    DDIMConfig config;
    read_fields(field, "field of a schedule", {
        {"num_train_timesteps", reads(config.num_train_timesteps)},
        {"beta_start", reads(config.beta_start)},
        {"beta_end", reads(config.beta_end)},
        {"beta_schedule", reads(config.beta_schedule, {"linear", "scaled_linear", "squaredcos_cap_v2"})},
        {"trained_betas",
         [&](const Field& f) {
             if (f.is_null()) return;
             config.trained_betas.emplace();
             for (const Field& beta : f.items()) config.trained_betas->push_back(beta.number());
         }},
        {"clip_sample", reads(config.clip_sample)},
        {"set_alpha_to_one", reads(config.set_alpha_to_one)},
        {"steps_offset", reads(config.steps_offset)},
        {"prediction_type", reads(config.prediction_type, {"epsilon", "sample", "v_prediction"})},
        {"thresholding", reads(config.thresholding)},
        {"dynamic_thresholding_ratio", reads(config.dynamic_thresholding_ratio)},
        {"clip_sample_range", reads(config.clip_sample_range)},
        {"sample_max_value", reads(config.sample_max_value)},
        {"timestep_spacing", reads(config.timestep_spacing, {"leading", "trailing", "linspace", "quadratic"})},
        {"rescale_betas_zero_snr", reads(config.rescale_betas_zero_snr)},
    });
    return config;
}

inline FlowSchedule parse_flow(const Field& field) {
    FlowSchedule flow;
    read_fields(field, "field of a flow schedule", {
        {"num_train_timesteps", reads(flow.num_train_timesteps)},
        {"shift", reads(flow.shift)},
        {"use_dynamic_shifting", reads(flow.use_dynamic_shifting)},
        {"base_shift", reads(flow.base_shift)},
        {"max_shift", reads(flow.max_shift)},
        {"base_image_seq_len", reads(flow.base_image_seq_len)},
        {"max_image_seq_len", reads(flow.max_image_seq_len)},
        {"shift_terminal", reads(flow.shift_terminal)},
        {"time_shift_type", reads(flow.time_shift_type, {"exponential", "linear"})},
    });
    flow.validate();
    return flow;
}

inline EDMSchedule parse_edm(const Field& field) {
    EDMSchedule edm;
    read_fields(field, "field of an EDM schedule", {
        {"sigma_min", reads(edm.sigma_min)},
        {"sigma_max", reads(edm.sigma_max)},
        {"sigma_data", reads(edm.sigma_data)},
        {"sigma_schedule", reads(edm.sigma_schedule, {"karras", "exponential"})},
        {"prediction_type", [&](const Field& f) {
             const bool epsilon = f.choice({"epsilon", "v_prediction"}) == 0;
             edm.prediction_type = epsilon ? PredictionType::epsilon : PredictionType::v_prediction;
         }},
    });
    edm.validate();
    return edm;
}

inline AnySchedule parse_schedule(const Field& field, const Field& type) {
    const std::size_t index = type.choice({"betas", "flow", "edm"});
    try {
        if (index == 1) return parse_flow(field);
        if (index == 2) return parse_edm(field);
        return Schedule(parse_betas(field));
    } catch (const std::invalid_argument& error) {
        field.fail(error.what());
    }
}

// The options of each method, by their names in Python.

inline std::map<std::string, Reader> option_readers(DDIM& ddim) {
    return {{"eta", reads(ddim.eta)},
            {"variance_type", reads(ddim.variance_type, {"fixed_small", "fixed_large"})},
            {"use_clipped_model_output", reads(ddim.use_clipped_model_output)},
            {"transitions", reads(ddim.transitions, {"exact", "diffusers"})}};
}

inline std::map<std::string, Reader> option_readers(DDPM& ddpm) {
    return {{"variance_type", reads(ddpm.variance_type, {"fixed_small", "fixed_large"})}};
}

inline std::map<std::string, Reader> option_readers(Euler& euler) {
    return {{"final_sigmas_type", reads(euler.final_sigmas_type, final_sigmas_names)},
            {"sigma_min", reads(euler.sigma_min)},
            {"sigma_max", reads(euler.sigma_max)},
            {"timestep_type", reads(euler.timestep_type, {"discrete", "continuous"})},
            {"mu", reads(euler.mu)},
            {"stochastic_sampling", reads(euler.stochastic_sampling)},
            {"use_clipped_model_output", reads(euler.use_clipped_model_output)}};
}

inline std::map<std::string, Reader> option_readers(EulerAncestral& euler) {
    return {{"eta", reads(euler.eta)},
            {"final_sigmas_type", reads(euler.final_sigmas_type, final_sigmas_names)},
            {"use_clipped_model_output", reads(euler.use_clipped_model_output)}};
}

inline std::map<std::string, Reader> option_readers(LCM& lcm) {
    return {{"original_inference_steps", reads(lcm.original_inference_steps)},
            {"timestep_scaling", reads(lcm.timestep_scaling)}};
}

inline std::map<std::string, Reader> option_readers(TCD& tcd) {
    return {{"gamma", reads(tcd.gamma)}, {"original_inference_steps", reads(tcd.original_inference_steps)}};
}

inline std::map<std::string, Reader> option_readers(DPMSolver& solver) {
    return {{"solver_order", reads(solver.solver_order)},
            {"algorithm_type", reads(solver.algorithm_type, {"dpmsolver++", "sde-dpmsolver++"})},
            {"solver_type", reads(solver.solver_type, {"midpoint", "heun"})},
            {"lower_order_final", reads(solver.lower_order_final)},
            {"euler_at_final", reads(solver.euler_at_final)},
            {"final_sigmas_type", reads(solver.final_sigmas_type, final_sigmas_names)},
            {"lambda_min_clipped", reads(solver.lambda_min_clipped)},
            {"mu", reads(solver.mu)}};
}

inline Method method_named(const Field& name) {
    static const std::vector<Method> all{DDIM{}, DDPM{}, DPMSolver{}, Euler{}, EulerAncestral{}, LCM{}, TCD{}};
    std::vector<const char*> names;
    for (const Method& method : all) names.push_back(std::visit([](const auto& made) { return made.name; }, method));
    return all[name.choice(names)];
}

inline Sampling parse_scheduling(const Field& root) {
    const Field method = root.at("method"), spacing = method.at("spacing");
    const Field type = root.at("schedule_type"), name = method.at("name");
    Sampling scheduling{parse_schedule(root.at("schedule"), type), method_named(name), {}};
    if (!scheduling.fits()) name.fail(name.shown() + " takes no schedule of type " + type.shown());
    const std::string what = text("option of method '", scheduling.method_name(), "'");
    std::visit([&](auto& made) { read_fields(method.at("options"), what, option_readers(made)); }, scheduling.method);
    if (!spacing.is_null()) scheduling.spacing = static_cast<Spacing>(spacing.choice(spacing_names));
    return scheduling;
}

inline std::vector<TensorInfo> parse_tensors(const Field& field) {
    std::vector<TensorInfo> infos;
    std::set<std::string> names;
    for (const Field& item : field.items()) {
        TensorInfo info{item.at("name").string(), item.at("dtype").string(), {}, item.at("meaning").string()};
        if (!names.insert(info.name).second) item.fail("a second '" + info.name + "'");
        for (const Field& dim : item.at("shape").items()) {
            if (dim.is_string() && dim.string().empty()) dim.fail("an empty name");
            info.shape.push_back(dim.is_string() ? Dim{0, dim.string()} : Dim{dim.integer(1), ""});
        }
        infos.push_back(std::move(info));
    }
    return infos;
}

inline std::optional<Manifest::Limit> parse_limit(const Field& field) {
    if (field.is_null()) return std::nullopt;
    const auto positive = [&](const char* name) {
        const Field value = field.at(name);
        if (!(value.number() > 0)) value.fail(value.shown() + " is not > 0");
        return value.number();
    };
    if (field.at("kind").choice({"clip", "threshold"}) == 0) return Manifest::Limit{"clip", positive("range"), 1};
    const Field ratio = field.at("ratio");
    if (!(ratio.number() >= 0 && ratio.number() <= 1)) ratio.fail(ratio.shown() + " is not in [0, 1]");
    return Manifest::Limit{"threshold", positive("max_value"), ratio.number()};
}

inline Manifest::Sampling parse_sampling(const Field& field, bool has_schedule) {
    Manifest::Sampling sampling;
    sampling.guided = field.at("guided").boolean();
    sampling.guidance_rescale = field.at("guidance_rescale").boolean();
    sampling.stochastic = field.at("stochastic").boolean();
    sampling.baked_schedule = field.at("baked_schedule").boolean();
    if (const auto asked = field.find("per_sample_steps"); asked && asked->boolean())
        asked->fail("is on, and this loader takes bundles without it");
    if (const auto seeded = field.find("seeded")) sampling.seeded = seeded->boolean();
    if (sampling.baked_schedule && !has_schedule)
        field.at("baked_schedule").fail("is on, and there is no schedule");
    sampling.dtype = field.at("dtype").string();
    sampling.limit = parse_limit(field.at("limit"));
    for (const auto& [name, value] : field.at("null_values").members())
        sampling.null_values[name] = value.integer(std::numeric_limits<std::int64_t>::min());
    return sampling;
}

/// Two numbers; `what` they are, for messages.
inline std::array<double, 2> parse_pair(const Field& field, const char* what) {
    const std::vector<Field> numbers = field.items();
    if (numbers.size() != 2) field.fail(field.shown() + " is not " + what);
    return {numbers[0].number(), numbers[1].number()};
}

inline Manifest::Engine parse_engine(const Field& field) {
    Manifest::Engine engine;
    field.at("flavour").choice({"standard", "rtx"});
    engine.flavour = field.at("flavour").string();
    engine.version = field.at("version").string();
    for (const Field& capability : field.at("compute_capabilities").items())
        engine.compute_capabilities.push_back(capability.string());
    for (const Field& profile : field.at("profiles").items()) {
        auto& ranges = engine.profiles.emplace_back();
        for (const auto& [name, range] : profile.members()) {
            const std::vector<Field> sizes = range.items();
            if (sizes.size() != 3) range.fail(range.shown() + " is not a least, best and largest size");
            ranges[name] = {sizes[0].integer(1), sizes[1].integer(1), sizes[2].integer(1)};
        }
    }
    if (engine.profiles.empty()) field.at("profiles").fail("no profile");
    const Field options = field.at("options");
    const Field compatibility = options.at("hardware_compatibility");
    engine.version_compatible = options.at("version_compatible").boolean();
    engine.ampere_plus = !compatibility.is_null() && compatibility.string() == "ampere_plus";
    engine.strip_plan = options.at("strip_plan").boolean();
    return engine;
}

inline Manifest::Target parse_target(const Field& field) {
    Manifest::Target target;
    target.device = field.at("device").choice({"cpu", "cuda"}) == 0 ? "cpu" : "cuda";
    target.platform = field.at("platform").string();
    target.machine = field.at("machine").string();
    for (const Field& feature : field.at("cpu_features").items()) target.cpu_features.push_back(feature.string());
    if (const auto capability = field.find("compute_capability")) target.compute_capability = capability->string();
    return target;
}

inline StepTable parse_table(const Field& field, const Manifest& manifest) {
    // What a double holds exactly.
    constexpr std::int64_t largest = std::int64_t{1} << 53;
    const auto* betas = manifest.scheduling ? std::get_if<Schedule>(&manifest.scheduling->schedule) : nullptr;
    const TensorInfo* const input = manifest.timestep_input();
    const std::vector<Field> timesteps = field.at("timesteps").items();
    StepTable table;
    // A baked schedule has no such input: there the numbers say it.
    table.float_timesteps = input != nullptr ? input->dtype == "float32"
                                             : std::any_of(timesteps.begin(), timesteps.end(),
                                                           [](const Field& timestep) { return timestep.is_float(); });
    for (const Field& timestep : timesteps) {
        if (table.float_timesteps) {
            table.timesteps.push_back(timestep.number());
            if (!std::isfinite(static_cast<float>(table.timesteps.back())))
                timestep.fail(timestep.shown() + " is not finite in float32");
        } else {
            const std::int64_t value = betas != nullptr ? timestep.integer(0, betas->config().num_train_timesteps - 1)
                                                        : timestep.integer(-largest, largest);
            table.timesteps.push_back(static_cast<double>(value));
        }
    }
    const Field scale = field.at("start_scale"), noising = field.at("noising");
    table.start_scale = scale.number();
    if (!(table.start_scale > 0)) scale.fail(scale.shown() + " is not > 0");
    if (!noising.is_null()) table.noising = parse_pair(noising, "a factor of x0 and one of the noise");
    const Field coefficients = field.at("coefficients");
    for (const Field& row : coefficients.items()) {
        const std::vector<Field> numbers = row.items();
        StepCoefficients values{};
        const bool looks_back = numbers.size() == values.size() + 1;
        if (numbers.size() != values.size() && !looks_back)
            row.fail(std::to_string(numbers.size()) + " numbers, not 6 or 7");
        for (std::size_t k = 0; k < values.size(); ++k) values[k] = numbers[k].number();
        table.rows.push_back(values);
        if (looks_back) table.next_from_previous_x0.push_back(numbers.back().number());
        if (looks_back && table.rows.size() == 1 && table.next_from_previous_x0[0] != 0)
            row.fail("the first step looks back at the x0 before it, of which there is none");
    }
    if (table.timesteps.empty() || table.rows.size() != table.timesteps.size())
        coefficients.fail(std::to_string(table.rows.size()) + " rows for " + std::to_string(table.timesteps.size()) +
                          " timesteps");
    if (table.looks_back() && table.next_from_previous_x0.size() != table.size())
        coefficients.fail("rows of 6 numbers and of 7");
    return table;
}

inline Manifest::Sample parse_sample(const Field& field) {
    Manifest::Sample sample;
    for (const Field& size : field.at("shape").items()) sample.shape.push_back(size.integer(1));
    sample.layout = field.at("layout").string();
    const Field range = field.at("range");
    if (!range.is_null()) sample.range = parse_pair(range, "a lowest and a highest value");
    return sample;
}

inline Manifest::Policy parse_policy(const Field& field) {
    Manifest::Policy policy;
    for (const auto& [name, each] : field.at("observations").members()) {
        Manifest::Policy::Observation observation{name, each.at("kind").choice({"state", "image"}) == 1, {}};
        for (const Field& size : each.at("shape").items()) observation.shape.push_back(size.integer(1));
        policy.observations.push_back(std::move(observation));
    }
    for (const auto& [name, to] : {std::pair{"n_obs_steps", &policy.n_obs_steps}, {"horizon", &policy.horizon},
                                   {"n_action_steps", &policy.n_action_steps}, {"action_dim", &policy.action_dim}})
        *to = field.at(name).integer(1);
    policy.first_action = field.at("first_action").integer(0);
    policy.committed = field.at("committed").boolean();
    const Field rate = field.at("rate");
    if (!rate.is_null()) policy.rate = rate.number();
    if (policy.first_action + policy.n_action_steps > policy.horizon)
        field.at("n_action_steps").fail("actions past the horizon");
    return policy;
}

inline Manifest::Component parse_component(const Field& field) {
    Manifest::Component component{field.at("model").string(), parse_tensors(field.at("inputs")),
                                  parse_tensors(field.at("outputs")), field.at("meaning").string(), std::nullopt};
    if (const std::optional<Field> upscale = field.find("upscale")) component.upscale = upscale->integer(1);
    return component;
}

/// A manifest of version 1 or 2 as version 3 has it; what it lacks is found when it is read.
inline void upgrade(nlohmann::json& json) {
    const auto object = [&](const char* name) {
        const auto found = json.find(name);
        return found != json.end() && found->is_object() ? &*found : nullptr;
    };
    const bool first = json["format_version"] == 1;
    if (first) {
        json["kind"] = json.value("graph", nlohmann::json());
        if (!json.contains("runtime")) json["runtime"] = "onnx";
        if (nlohmann::json* const table = object("table")) table->update({{"start_scale", 1}, {"noising", nullptr}});
    }
    json["schedule_type"] = json["method"] = nullptr;
    const nlohmann::json* const schedule = object("schedule");
    nlohmann::json* const sampling = object("sampling");
    if (schedule == nullptr || sampling == nullptr) return;
    nlohmann::json options = nlohmann::json::object();
    for (const char* name : {"eta", "use_clipped_model_output"})
        if (sampling->contains(name)) options[name] = sampling->at(name);
    json["schedule_type"] = "betas";
    json["method"] = {{"name", "ddim"}, {"options", options}, {"spacing", nullptr}};
    if (!first) return;
    const DDIMConfig defaults;
    const auto field = [&](const char* name, nlohmann::json missing) { return schedule->value(name, missing); };
    nlohmann::json& limit = (*sampling)["limit"] = nullptr;
    if (field("thresholding", defaults.thresholding) == true) {
        limit = {{"kind", "threshold"},
                 {"ratio", field("dynamic_thresholding_ratio", defaults.dynamic_thresholding_ratio)},
                 {"max_value", field("sample_max_value", defaults.sample_max_value)}};
    } else if (field("clip_sample", defaults.clip_sample) == true) {
        limit = {{"kind", "clip"}, {"range", field("clip_sample_range", defaults.clip_sample_range)}};
    }
}

/// What no reader of the manifest uses, but the format promises.
inline void check_records(const Field& root) {
    const Field noise = root.at("noise");
    for (const char* name : {"generator", "key", "counter"}) noise.at(name).string();
    for (const char* name : {"stream_initial", "stream_step"}) noise.at(name).integer(0);
    for (const Field& entry : root.at("parity").items()) {
        entry.at("batch").integer(1);
        if (const std::optional<Field> steps = entry.find("steps")) steps->integer(1);
        for (const char* name : {"largest_error", "tolerance"}) entry.at(name).number();
    }
}

/// Whether an input is the sampler's own, not one of the model's.
inline bool is_own(std::string_view name) {
    static constexpr std::array<std::string_view, 10> own{
        "sample", "timestep", "timesteps", "coefficients", "previous_x0", "noise", "guidance_scale", "guidance_rescale",
        "num_inference_steps", "seed"};
    return std::find(own.begin(), own.end(), name) != own.end();
}

inline std::string shown(const std::vector<Dim>& shape) {
    std::string text = "[";
    for (const Dim& dim : shape)
        text += (text.size() > 1 ? ", " : "") + (dim.fixed() ? std::to_string(dim.size) : dim.name);
    return text + "]";
}

/// The input that a conditioning input is the unconditional half of, or none.
inline std::string conditional_of(const std::string& name) {
    constexpr std::string_view prefix = "uncond_";
    return name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : "";
}

/// That the graph before the steps takes timesteps and conditions, and gives inputs of the steps.
inline void check_before(const Field& root, const Manifest& manifest) {
    if (!manifest.before) return;
    const Field before = root.at("before");
    if (manifest.kind != "step" || manifest.runtime != "onnx")
        before.fail("is there, in a bundle of kind '" + manifest.kind + "' for '" + manifest.runtime + "'");
    const auto same = [](const TensorInfo& one, const TensorInfo& other) {
        return one.dtype == other.dtype && shown(one.shape) == shown(other.shape);
    };
    const auto timesteps = std::find_if(manifest.before->inputs.begin(), manifest.before->inputs.end(),
                                        [](const TensorInfo& info) { return info.name == "timesteps"; });
    if (timesteps == manifest.before->inputs.end()) before.at("inputs").fail("no 'timesteps'");
    for (const TensorInfo& info : manifest.before->inputs) {
        const TensorInfo* const other = manifest.find_input(info.name);
        const bool is_timesteps = info.name == "timesteps";
        if ((!is_timesteps && is_own(info.name)) || (other != nullptr && !same(info, *other)))
            before.at("inputs").fail("'" + info.name + "' is not that of the steps");
        if (is_timesteps && (info.shape.size() != 1 || info.dtype != manifest.table.timestep_dtype()))
            before.at("inputs").fail("'timesteps' is not [steps] of the table's dtype");
    }
    for (TensorInfo info : manifest.before->outputs) {
        // A row for each sample, in the place of one for each step.
        const auto is_batch = [](const Dim& dim) { return dim.name == "batch"; };
        if (!info.shape.empty() && info.shape[0].name == "steps") {
            info.shape.erase(info.shape.begin());
            if (std::none_of(info.shape.begin(), info.shape.end(), is_batch))
                info.shape.insert(info.shape.begin(), Dim{0, "batch"});
        }
        const TensorInfo* const input = manifest.find_input(info.name);
        const bool fits = input != nullptr && !is_own(info.name) && same(info, *input) &&
                          std::count_if(info.shape.begin(), info.shape.end(), is_batch) <= 1 &&
                          std::all_of(info.shape.begin(), info.shape.end(),
                                      [&](const Dim& dim) { return dim.fixed() || is_batch(dim); });
        if (!fits) before.at("outputs").fail("'" + info.name + "' is no input of the steps");
    }
}

/// That the graph has the inputs and outputs that its kind promises, and no input that a call has nothing for.
inline void check_interface(const Field& root, const Manifest& manifest) {
    const Manifest::Sampling& sampling = manifest.sampling;
    const bool loop = manifest.kind == "loop";
    if (sampling.baked_schedule && !loop) root.at("sampling").fail("a baked schedule in a graph of one step");
    if (sampling.seeded && !loop) root.at("sampling").fail("seeds in a graph of one step");
    const bool looks_back = manifest.table.looks_back();
    const std::size_t rank = manifest.sample.shape.size() + 1;
    std::map<std::string, std::size_t> needed{{sampling.seeded ? "seed" : "sample", sampling.seeded ? 1 : rank}};
    if (sampling.baked_schedule) {
        needed["num_inference_steps"] = 0;
    } else {
        needed[loop ? "timesteps" : "timestep"] = 1;
        // A model may need it before the steps alone.
        if (manifest.before && manifest.find_input("timestep") == nullptr) needed.erase("timestep");
        needed["coefficients"] = 2;
    }
    if (sampling.stochastic && !sampling.seeded) needed["noise"] = loop ? rank + 1 : rank;
    if (looks_back && !loop) needed["previous_x0"] = rank;
    if (sampling.guided) needed["guidance_scale"] = 1;
    if (sampling.guidance_rescale) needed["guidance_rescale"] = 1;
    const Field inputs = root.at("inputs");
    for (const auto& [name, dims] : needed)
        if (manifest.find_input(name) == nullptr) inputs.fail("no '" + name + "'");
    const std::string result = loop ? "samples" : "next_sample";
    for (const std::string& name : {result, std::string(looks_back && !loop ? "pred_original_sample" : result)})
        if (manifest.find_output(name) == nullptr) root.at("outputs").fail("no '" + name + "'");

    if (const TensorInfo* const sample = manifest.find_input("sample")) {
        const std::vector<Dim>& state = sample->shape;
        const std::vector<std::int64_t>& own = manifest.sample.shape;
        bool fits = state.size() == rank && state[0].name == "batch";
        for (std::size_t k = 0; fits && k < own.size(); ++k)
            fits = !state[k + 1].fixed() || state[k + 1].size == own[k];
        if (!fits) root.at("sample").at("shape").fail("is not that of the input 'sample'");
    }

    for (const TensorInfo& input : manifest.inputs) {
        if (is_own(input.name)) {
            const bool is_timestep = input.name == "timestep" || input.name == "timesteps";
            if (is_timestep && input.dtype != manifest.table.timestep_dtype())
                inputs.fail("'" + input.name + "' is " + input.dtype + ", not int64 or float32");
            const auto found = needed.find(input.name);
            if (found == needed.end()) inputs.fail("'" + input.name + "', which 'sampling' has no use for");
            if (input.shape.size() != found->second)
                inputs.fail("'" + input.name + "' has not " + std::to_string(found->second) + " dimensions");
            const auto columns = static_cast<std::int64_t>(manifest.table.num_columns());
            if (input.name == "coefficients" && input.shape[1].fixed() && input.shape[1].size != columns)
                inputs.fail("'coefficients' has " + std::to_string(input.shape[1].size) + " columns, the table " +
                            std::to_string(columns));
        } else if (const std::string half = conditional_of(input.name); !half.empty()) {
            const TensorInfo* other = manifest.find_input(half);
            if (other == nullptr || other->shape.size() != input.shape.size())
                inputs.fail("'" + input.name + "' without a '" + half + "' of as many dimensions");
        }
    }
}

}  // namespace detail

inline std::vector<const TensorInfo*> Manifest::conditions() const {
    std::vector<const TensorInfo*> found;
    const auto add = [&](const std::vector<TensorInfo>& infos) {
        for (const TensorInfo& info : infos) {
            const auto has_its_name = [&](const TensorInfo* other) { return other->name == info.name; };
            const bool computed = before && find(before->outputs, info.name) != nullptr;
            if (!detail::is_own(info.name) && detail::conditional_of(info.name).empty() && !computed &&
                std::none_of(found.begin(), found.end(), has_its_name))
                found.push_back(&info);
        }
    };
    add(inputs);
    if (before) add(before->inputs);
    return found;
}

/// Reads and checks the text of a manifest; `file` is its name in messages.
///
/// Throws BundleError: it is no manifest, one of a newer format, or one that lacks what the format promises.
inline Manifest parse_manifest(const std::string& text, const std::string& file = "manifest.json") {
    nlohmann::json json = detail::parse_json(text, file, "fastddim-bundle", Manifest::newest_format_version,
                                             "fastddim export onnx");
    if (json["format_version"] < Manifest::newest_format_version) detail::upgrade(json);
    const detail::Field root(json, file);
    Manifest manifest;
    manifest.kind = root.at("kind").choice({"loop", "step"}) == 0 ? "loop" : "step";
    manifest.runtime = root.at("runtime").string();
    if (const auto target = root.find("target")) manifest.target = detail::parse_target(*target);
    if (manifest.runtime == "aoti" && !manifest.target) root.at("target");
    if (const auto engine = root.find("engine")) manifest.engine = detail::parse_engine(*engine);
    if (manifest.runtime == "tensorrt" && !manifest.engine) root.at("engine");
    manifest.model = root.at("model").string();
    manifest.files = detail::parse_files(root.at("files"), file);
    const auto check_listed = [&](const detail::Field& model) {
        if (manifest.files.count(model.string()) == 0) model.fail("no file " + model.shown() + " among 'files'");
    };
    check_listed(root.at("model"));
    if (const std::optional<detail::Field> components = root.find("components"))
        for (const auto& [name, component] : components->members()) {
            check_listed(component.at("model"));
            manifest.components[name] = detail::parse_component(component);
        }
    if (const std::optional<detail::Field> before = root.find("before")) {
        check_listed(before->at("model"));
        manifest.before = detail::parse_component(*before);
    }
    if (const auto policy = root.find("policy")) manifest.policy = detail::parse_policy(*policy);
    if (const auto zeros = root.find("zeros_for_empty_prompt")) manifest.zeros_for_empty_prompt = zeros->boolean();
    manifest.inputs = detail::parse_tensors(root.at("inputs"));
    manifest.outputs = detail::parse_tensors(root.at("outputs"));
    if (!root.at("schedule").is_null()) manifest.scheduling = detail::parse_scheduling(root);
    for (const char* name : {"schedule_type", "method"}) root.at(name);
    manifest.sampling = detail::parse_sampling(root.at("sampling"), manifest.scheduling.has_value());
    manifest.table = detail::parse_table(root.at("table"), manifest);
    manifest.sample = detail::parse_sample(root.at("sample"));
    for (const auto& [name, value] : root.at("versions").members()) manifest.versions[name] = value.string();
    detail::check_records(root);
    detail::check_interface(root, manifest);
    detail::check_before(root, manifest);
    return manifest;
}

/// An opened bundle, its files checked.
struct Bundle {
    std::filesystem::path path;
    Manifest manifest;

    /// The graph's file.
    std::filesystem::path model_path() const { return path / manifest.model; }

    /// The file of the graph before the steps; std::bad_optional_access where the bundle has none.
    std::filesystem::path before_path() const { return path / manifest.before.value().model; }

    /// The file of a component's graph; std::out_of_range where the bundle has none of the name.
    std::filesystem::path component_path(const std::string& name) const {
        return path / manifest.components.at(name).model;
    }
};

namespace detail {

inline std::string read_all(const std::filesystem::path& path) {
    std::error_code failed;
    const std::uintmax_t size = std::filesystem::file_size(path, failed);
    std::ifstream stream(path, std::ios::binary);
    std::string content(failed ? 0 : size, '\0');
    stream.read(content.data(), static_cast<std::streamsize>(content.size()));
    if (failed || !stream) throw BundleError("bundle: '" + path.string() + "' cannot be read; export it again");
    return content;
}

inline std::string hash_of(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    std::vector<char> block(1U << 20);
    Sha256 digest;
    while (stream) {
        stream.read(block.data(), static_cast<std::streamsize>(block.size()));
        digest.update(block.data(), static_cast<std::size_t>(stream.gcount()));
    }
    if (!stream.eof()) throw BundleError("bundle: '" + path.string() + "' cannot be read; export it again");
    return digest.hex();
}

/// Whether a path, its links resolved, is in a folder.
inline bool is_within(const std::filesystem::path& folder, const std::filesystem::path& path) {
    std::error_code failed;
    const std::filesystem::path root = std::filesystem::canonical(folder, failed);
    if (failed) return false;
    const std::filesystem::path real = std::filesystem::weakly_canonical(path, failed);
    if (failed) return false;
    return std::mismatch(root.begin(), root.end(), real.begin(), real.end()).first == root.end();
}

inline void check_file(const std::filesystem::path& folder, const std::string& name, const Manifest::File& expected,
                       bool check_hash) {
    const std::filesystem::path member = folder / name;
    const auto fail = [&](const std::string& what) {
        throw BundleError("bundle: '" + member.string() + "' " + what + "; export it again");
    };
    std::error_code failed;
    if (std::filesystem::is_symlink(std::filesystem::symlink_status(member, failed)) || !is_within(folder, member))
        fail("leads out of the folder");
    if (!std::filesystem::is_regular_file(member, failed)) fail("is missing");
    const std::uintmax_t size = std::filesystem::file_size(member, failed);
    if (failed || size != expected.bytes)
        fail("has " + std::to_string(size) + " bytes, the manifest says " + std::to_string(expected.bytes));
    if (check_hash && hash_of(member) != expected.sha256) fail("is not the file that was exported (SHA-256)");
}

}  // namespace detail

/// Reads and checks a bundle; without `check_hashes` its files' names and sizes alone.
///
/// Throws BundleError: no bundle, one of a newer format, or one that is damaged.
inline Bundle open_bundle(const std::filesystem::path& folder, bool check_hashes = true) {
    const std::filesystem::path file = folder / "manifest.json";
    std::error_code failed;
    if (!std::filesystem::is_regular_file(file, failed))
        throw BundleError("bundle: '" + file.string() + "' is missing; pass a folder that `fastddim export` wrote");
    Bundle bundle{folder, parse_manifest(detail::read_all(file), file.string())};
    for (const auto& [name, expected] : bundle.manifest.files)
        detail::check_file(folder, name, expected, check_hashes);
    return bundle;
}

}  // namespace fastddim
