// A call of an exported sampler, checked against its manifest, whatever runtime then runs it: the table, the starting
// state, guidance scales and conditions, as fastddim/export/bundle_sampler.py has them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/philox.hpp"
#include "fastddim/samplers.hpp"
#include "fastddim/schedule.hpp"

namespace fastddim {

/// Numbers in rows of the last dimension.
template <class T>
struct Array {
    std::vector<std::int64_t> shape;
    std::vector<T> values;
};

/// A float16 number, as its bits.
struct Half {
    std::uint16_t bits = 0;
};

/// What a model is conditioned on, `[B, ...]`; `std::uint8_t` is for inputs of dtype bool too.
using Condition = std::variant<Array<float>, Array<double>, Array<std::int64_t>, Array<std::int32_t>,
                               Array<std::uint8_t>, Array<Half>>;

/// What to sample.
struct Call {
    /// How many samples to draw from `seeds`, where there is no `start`.
    std::int64_t batch = 1;
    /// The starting state `[B, ...]`.
    std::optional<Array<float>> start;
    /// One per sample, or an integer s for s, s + 1, ...
    std::optional<Seeds> seeds;
    /// The steps of this run; the bundle's own by default. A baked schedule takes `num_inference_steps` alone; a bundle
    /// made from a table takes none of the three.
    std::optional<std::int64_t> num_inference_steps;
    std::optional<std::vector<double>> timesteps;
    std::optional<double> eta;
    /// Any method's table instead of the three, for bundles without a baked schedule.
    std::optional<StepTable> table;
    /// For bundles with guidance: one number, or one per sample; without a rescale it is 0.
    std::vector<float> guidance_scale;
    std::vector<float> guidance_rescale;
    /// `{height, width}` of the samples, for bundles of any size; the model's own by default.
    std::optional<std::array<std::int64_t, 2>> size;
    /// The model's other inputs, by name.
    std::map<std::string, Condition> conditions;
    /// The conditions' unconditional halves, where the bundle knows none.
    std::map<std::string, Condition> uncond_conditions;
};

/// An input of a graph: one that stays the same in all steps, or a row of what was computed for them.
struct Feed {
    std::string name;
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::vector<unsigned char> bytes;
};

/// A call that its bundle takes.
struct PreparedCall {
    StepTable table;
    /// Of a graph that draws its own, the shape alone.
    Array<float> start;
    /// The seeds of the steps' noise, where they add any and the graph does not draw it.
    std::optional<std::vector<std::uint64_t>> noise_seeds;
    std::vector<Feed> feeds;
};

namespace detail {

inline std::string shown(const std::vector<std::int64_t>& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

/// The number of elements of a shape; std::invalid_argument where no array has them.
inline std::size_t count_of(const char* name, const std::vector<std::int64_t>& shape) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    std::int64_t count = 1;
    for (const std::int64_t size : shape) {
        if (size < 1 || count > most / size)
            throw std::invalid_argument(text(name, ": shape ", shown(shape), "; pass sizes >= 1 that fit in memory"));
        count *= size;
    }
    return static_cast<std::size_t>(count);
}

/// Whether an array is whole and has the shape that an input asks for.
template <class T>
bool has_shape(const Array<T>& array, const std::vector<Dim>& wanted, std::optional<std::int64_t> batch) {
    if (array.shape.size() != wanted.size()) return false;
    std::size_t count = 1;
    for (std::size_t k = 0; k < wanted.size(); ++k) {
        const std::int64_t size = array.shape[k];
        if (size < 1 || (wanted[k].fixed() && size != wanted[k].size)) return false;
        if (wanted[k].name == "batch" && batch && size != *batch) return false;
        // Without a product that overflows.
        if (static_cast<std::size_t>(size) > array.values.size() / count) return false;
        count *= static_cast<std::size_t>(size);
    }
    return array.values.size() == count;
}

template <class T>
constexpr const char* dtype_of() {
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, double>) return "float64";
    if constexpr (std::is_same_v<T, std::int64_t>) return "int64";
    if constexpr (std::is_same_v<T, std::int32_t>) return "int32";
    if constexpr (std::is_same_v<T, std::uint8_t>) return "uint8";
    if constexpr (std::is_same_v<T, Half>) return "float16";
}

/// Values as bytes of a dtype, where numpy's "same_kind" casting allows it.
template <class From>
std::optional<std::vector<unsigned char>> cast(const std::vector<From>& values, const std::string& dtype) {
    constexpr bool number = !std::is_same_v<From, Half>;
    if constexpr (number) {
        if (dtype == "float32") return to_bytes<float>(values);
        if (dtype == "float64") return to_bytes<double>(values);
    }
    if constexpr (std::is_integral_v<From>) {
        if (dtype == "int64") return to_bytes<std::int64_t>(values);
        if (dtype == "int32") return to_bytes<std::int32_t>(values);
    }
    if (dtype == dtype_of<From>() || (dtype == "bool" && std::is_same_v<From, std::uint8_t>))
        return to_bytes<From>(values);
    return std::nullopt;
}

/// A condition as an input; `name` is what the caller calls it.
inline Feed fit(const std::string& name, const TensorInfo& info, const Condition& condition, std::int64_t batch) {
    return std::visit(
        [&](const auto& array) {
            using T = std::decay_t<decltype(array.values[0])>;
            std::optional<std::vector<unsigned char>> bytes;
            if (has_shape(array, info.shape, batch)) bytes = cast(array.values, info.dtype);
            if (!bytes)
                throw std::invalid_argument(text(name, ": ", dtype_of<T>(), " of shape ", shown(array.shape), " with ",
                                                 array.values.size(), " values; pass ", info.dtype, " of shape ",
                                                 shown(info.shape), ", the batch is ", batch));
            return Feed{info.name, info.dtype, array.shape, std::move(*bytes)};
        },
        condition);
}

/// A condition's unconditional half, filled with the bundle's value for it.
inline Feed filled(const TensorInfo& info, const std::vector<std::int64_t>& shape, std::int64_t value) {
    const std::vector<std::int64_t> values(count_of(info.name.c_str(), shape), value);
    std::optional<std::vector<unsigned char>> bytes = cast(values, info.dtype);
    if (!bytes) throw std::invalid_argument(info.name + ": no value for " + info.dtype + "; pass it");
    return {info.name, info.dtype, shape, std::move(*bytes)};
}

inline Feed per_sample(const char* name, const std::vector<float>& values, std::int64_t batch) {
    const auto count = static_cast<std::size_t>(batch);
    if ((values.size() != 1 && values.size() != count) ||
        !std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); }))
        throw std::invalid_argument(
            text(name, ": ", values.size(), " values; pass a finite number, or one for each of ", batch, " samples"));
    const std::vector<float> each = values.size() == 1 ? std::vector<float>(count, values[0]) : values;
    return {name, "float32", {batch}, to_bytes<float>(each)};
}

/// A table as the graph takes it: its timesteps in the graph's dtype, and a column for the previous x0 where that has one.
/// `argument` is what made it, for messages.
inline StepTable fit_table(const Manifest& manifest, StepTable table, const std::string& argument) {
    if (table.rows.empty() || table.timesteps.size() != table.rows.size() ||
        (table.looks_back() && table.next_from_previous_x0.size() != table.rows.size()))
        throw std::invalid_argument(text("table: ", table.timesteps.size(), " timesteps and ", table.rows.size(),
                                         " rows; pass as many of both, at least one"));
    if (table.stochastic() && !manifest.sampling.stochastic)
        throw std::invalid_argument(
            text(argument, ", but this bundle has no input for noise; export it with --noise"));
    const TensorInfo* const input = manifest.timestep_input();
    if (input == nullptr) return table;
    table.float_timesteps = input->dtype == "float32";
    for (const double t : table.timesteps)
        if (table.float_timesteps ? !std::isfinite(t) : t != std::floor(t) || !(std::abs(t) <= 9007199254740992.0))
            throw std::invalid_argument(text("timesteps: ", t, "; this bundle's graph takes ", input->dtype,
                                             ", pass ", table.float_timesteps ? "finite" : "whole", " numbers"));
    if (table.looks_back() && !manifest.table.looks_back())
        throw std::invalid_argument("table: it looks back at the previous x0, which this bundle's graph does not; export "
                                    "it with such a method, or pass a table of first order");
    if (manifest.table.looks_back()) table.next_from_previous_x0.resize(table.size());
    return table;
}

inline StepTable table_of(const Manifest& manifest, const Call& call) {
    const bool baked = manifest.sampling.baked_schedule;
    const char* const given = call.num_inference_steps ? "num_inference_steps"
                              : call.timesteps         ? "timesteps"
                              : call.eta               ? "eta"
                                                       : nullptr;
    if (call.table) {
        if (baked)
            throw std::invalid_argument("table: this bundle derives its table itself; pass num_inference_steps alone");
        if (given != nullptr)
            throw std::invalid_argument(text("table, ", given, ": a table has its steps already; pass one of the two"));
        return fit_table(manifest, *call.table, "table: its steps add noise");
    }
    if (!manifest.scheduling) {
        if (given != nullptr)
            throw std::invalid_argument(
                text(given, ": given, but this bundle was made from a table and has no schedule to make others from; "
                            "leave it out, or export another table"));
        return manifest.table;
    }
    const Sampling& scheduling = *manifest.scheduling;
    if (baked && (call.timesteps || (call.eta && *call.eta != scheduling.eta().value_or(0))))
        throw std::invalid_argument(
            "timesteps, eta: this bundle derives its table itself; pass num_inference_steps alone");
    if (call.num_inference_steps && call.timesteps)
        throw std::invalid_argument("num_inference_steps, timesteps: pass one of the two");
    if (given == nullptr) return manifest.table;
    Steps steps(call.num_inference_steps.value_or(static_cast<std::int64_t>(manifest.table.size())));
    if (baked || *steps.num_inference_steps < 1)
        require_int("num_inference_steps", *steps.num_inference_steps, 1, manifest.most_steps());
    if (call.timesteps) {
        steps.num_inference_steps.reset();
        steps.timesteps = call.timesteps;
    }
    const std::string argument = call.eta ? text("eta: ", *call.eta) : text(given, ": its steps add noise");
    return fit_table(manifest, scheduling.build(steps, baked ? std::nullopt : call.eta), argument);
}

inline std::vector<std::int64_t> shape_of(const Manifest& manifest, const Call& call) {
    std::vector<Dim> expected{{0, "batch"}};
    for (const std::int64_t size : manifest.sample.shape) expected.push_back({size, ""});
    if (const TensorInfo* const sample = manifest.find_input("sample")) expected = sample->shape;
    if (call.start && manifest.sampling.seeded)
        throw std::invalid_argument("start: a state, but this bundle draws its own from seeds; pass a batch size");
    if (call.start) {
        if (!has_shape(*call.start, expected, std::nullopt))
            throw std::invalid_argument(text("start: shape ", shown(call.start->shape), " with ",
                                             call.start->values.size(), " values; pass a state ", shown(expected)));
        return call.start->shape;
    }
    if (call.batch < 1) throw std::invalid_argument(text("batch: ", call.batch, "; pass an integer >= 1"));
    std::vector<std::int64_t> shape{call.batch};
    shape.insert(shape.end(), manifest.sample.shape.begin(), manifest.sample.shape.end());
    if (call.size) {
        const bool resizable = shape.size() == 4 && expected[2].name == "height" && expected[3].name == "width";
        const bool own = shape.size() == 4 && shape[2] == (*call.size)[0] && shape[3] == (*call.size)[1];
        if (!resizable && !own)
            throw std::invalid_argument(text("size: [", (*call.size)[0], ", ", (*call.size)[1],
                                             "]; this bundle makes samples ", shown(manifest.sample.shape), " alone"));
        shape[2] = (*call.size)[0];
        shape[3] = (*call.size)[1];
    }
    return shape;
}

inline std::vector<Feed> scales_of(const Manifest& manifest, const Call& call, std::int64_t batch) {
    std::vector<Feed> feeds;
    if (!manifest.sampling.guided && !call.guidance_scale.empty())
        throw std::invalid_argument(
            "guidance_scale: given, but this bundle was exported without guidance; leave it out");
    if (manifest.sampling.guided) {
        if (call.guidance_scale.empty())
            throw std::invalid_argument(
                "guidance_scale: missing; this bundle has guidance, pass a number or one per sample");
        feeds.push_back(per_sample("guidance_scale", call.guidance_scale, batch));
    }
    const std::vector<float> rescale = call.guidance_rescale.empty() ? std::vector<float>{0} : call.guidance_rescale;
    if (manifest.sampling.guidance_rescale) {
        feeds.push_back(per_sample("guidance_rescale", rescale, batch));
    } else if (std::any_of(rescale.begin(), rescale.end(), [](float value) { return value != 0; })) {
        throw std::invalid_argument("guidance_rescale: given, but this bundle was exported without it; leave it out");
    }
    return feeds;
}

inline std::vector<Feed> conditions_of(const Manifest& manifest, const Call& call, std::int64_t batch) {
    std::string taken;
    const std::vector<const TensorInfo*> conditions = manifest.conditions();
    for (const TensorInfo* info : conditions) taken += (taken.empty() ? "" : ", ") + info->name;
    for (const auto* group : {&call.conditions, &call.uncond_conditions})
        for (const auto& [name, condition] : *group)
            if (std::none_of(conditions.begin(), conditions.end(),
                             [&, &key = name](const TensorInfo* info) { return info->name == key; }))
                throw std::invalid_argument(name + ": this bundle takes " + (taken.empty() ? "no conditions" : taken));
    std::vector<Feed> feeds;
    for (const TensorInfo* info : conditions) {
        const auto given = call.conditions.find(info->name);
        if (given == call.conditions.end())
            throw std::invalid_argument(info->name + ": missing; pass an array " + shown(info->shape));
        feeds.push_back(fit(info->name, *info, given->second, batch));
        const TensorInfo* other = manifest.find_taken("uncond_" + info->name);
        if (other == nullptr) continue;
        const auto uncond = call.uncond_conditions.find(info->name);
        const auto null = manifest.sampling.null_values.find(info->name);
        if (uncond != call.uncond_conditions.end()) {
            feeds.push_back(fit("uncond_conditions: " + info->name, *other, uncond->second, batch));
        } else if (null != manifest.sampling.null_values.end()) {
            feeds.push_back(filled(*other, feeds.back().shape, null->second));
        } else {
            throw std::invalid_argument("uncond_conditions: '" + info->name +
                                        "' is missing, and the bundle knows no value for it; pass it");
        }
    }
    return feeds;
}

}  // namespace detail

/// Checks a call against its bundle, before any work.
///
/// Throws std::invalid_argument: arguments that the bundle does not take, or of the wrong shape or type.
inline PreparedCall prepare(const Manifest& manifest, const Call& call) {
    PreparedCall ready;
    ready.table = detail::table_of(manifest, call);
    ready.start.shape = detail::shape_of(manifest, call);
    const std::int64_t batch = ready.start.shape[0];
    const std::size_t count = detail::count_of("batch, size", ready.start.shape);
    const bool noisy = manifest.sampling.stochastic && ready.table.stochastic();
    std::vector<std::uint64_t> seeds;
    if (call.seeds) {
        seeds = call.seeds->of_batch(static_cast<std::size_t>(batch));
    } else if (!call.start || noisy) {
        throw std::invalid_argument("seeds: missing; pass one integer per sample, or one integer s for s, s + 1, ...");
    }
    ready.feeds = detail::scales_of(manifest, call, batch);
    for (Feed& feed : detail::conditions_of(manifest, call, batch)) ready.feeds.push_back(std::move(feed));
    if (call.start) {
        ready.start.values = call.start->values;
    } else if (manifest.sampling.seeded) {
        ready.feeds.push_back({"seed", "int64", {batch}, detail::to_bytes<std::int64_t>(seeds)});
    } else {
        ready.start.values.resize(count);
        normal(seeds, 0, Stream::initial, count / seeds.size(), ready.start.values.data());
        for (float& value : ready.start.values) value *= static_cast<float>(ready.table.start_scale);
    }
    if (noisy && !manifest.sampling.seeded) ready.noise_seeds = std::move(seeds);
    return ready;
}

}  // namespace fastddim
