// What a request may say, by its bundle's manifest, and the runs that requests become.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"

namespace server {

using Json = nlohmann::json;

/// A request that cannot be taken; the message names the field, its value and what to pass.
class BadRequest : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

/// One picture.
struct Request {
    std::uint64_t seed = 0;
    /// The bundle's own run by default.
    std::optional<std::int64_t> num_inference_steps;
    std::optional<double> eta;
    std::optional<float> guidance_scale;
    std::optional<float> guidance_rescale;
    std::map<std::string, std::variant<std::int64_t, double>> conditions;

    bool shares_run_with(const Request& other) const {
        return num_inference_steps == other.num_inference_steps && eta == other.eta;
    }
};

/// Requests that share a run, as one call.
inline fastddim::Call to_call(const std::vector<Request>& requests) {
    fastddim::Call call;
    call.batch = static_cast<std::int64_t>(requests.size());
    call.num_inference_steps = requests.front().num_inference_steps;
    call.eta = requests.front().eta;
    std::vector<std::uint64_t> seeds;
    for (const Request& request : requests) {
        seeds.push_back(request.seed);
        if (request.guidance_scale) call.guidance_scale.push_back(*request.guidance_scale);
        if (request.guidance_rescale) call.guidance_rescale.push_back(*request.guidance_rescale);
        for (const auto& [name, value] : request.conditions)
            std::visit(
                [&, &key = name](auto number) {
                    using Numbers = fastddim::Array<decltype(number)>;
                    const auto entry = call.conditions.try_emplace(key, Numbers{{call.batch}, {}}).first;
                    std::get<Numbers>(entry->second).values.push_back(number);
                },
                value);
    }
    call.seeds = std::move(seeds);
    return call;
}

/// A value in a message: ASCII, and not long.
inline std::string shown(const Json& value) {
    const std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

/// The fields that a bundle's requests have.
class RequestReader {
   public:
    /// Throws BundleError: the model is conditioned on more than numbers, or has no value for an unconditional half; or
    /// the bundle was made from a table of more steps than are allowed here.
    RequestReader(const fastddim::Bundle& bundle, std::int64_t max_steps) {
        const fastddim::Manifest& manifest = bundle.manifest;
        add("seed", true, {{"type", "integer, or a string of one"}, {"minimum", 0}, {"maximum", last_seed}},
            [](Request& request, const Json& value) { request.seed = to_seed(value); });
        if (manifest.scheduling) {
            // The bundle's own run may have more steps than are allowed here.
            const std::int64_t most = std::min(max_steps, manifest.most_steps());
            const bool too_long = manifest.table.size() > static_cast<std::size_t>(most);
            add_integer("num_inference_steps", too_long, 1, most,
                        [](Request& request, std::int64_t value) { request.num_inference_steps = value; });
            if (!too_long) fields_.at("num_inference_steps").description["default"] = manifest.table.size();
        } else if (manifest.table.size() > static_cast<std::size_t>(max_steps)) {
            throw fastddim::BundleError(fastddim::detail::text(
                "bundle: '", bundle.path.string(), "' was made from a table of ", manifest.table.size(), " steps, and ",
                max_steps, " are allowed; pass a larger --max-steps"));
        }
        const auto eta = manifest.scheduling ? manifest.scheduling->eta() : std::nullopt;
        if (eta && manifest.sampling.stochastic && !manifest.sampling.baked_schedule) {
            add_number("eta", false, 0, 1, [](Request& request, double value) { request.eta = value; });
            fields_.at("eta").description["default"] = *eta;
        }
        if (manifest.sampling.guided)
            add_number("guidance_scale", true, -largest_scale, largest_scale, [](Request& request, double value) {
                request.guidance_scale = static_cast<float>(value);
            });
        if (manifest.sampling.guidance_rescale)
            add_number("guidance_rescale", false, 0, 1, [](Request& request, double value) {
                request.guidance_rescale = static_cast<float>(value);
            });
        for (const fastddim::TensorInfo* info : manifest.conditions()) add_condition(bundle, *info);
    }

    /// Throws BadRequest.
    Request read(const std::string& body) const {
        const Json json = parse(body);
        if (!json.is_object()) throw BadRequest("body: " + shown(json) + "; pass a JSON object");
        Request request;
        if (fields_.count("guidance_rescale") != 0) request.guidance_rescale = 0.0F;
        for (const auto& [name, value] : json.items()) fields_.at(name).set(request, value);
        for (const auto& [name, field] : fields_)
            if (field.required && !json.contains(name)) throw BadRequest(name + ": missing; pass it");
        return request;
    }

    /// Each field's type and limits.
    Json describe() const {
        Json all = Json::object();
        for (const auto& [name, field] : fields_) {
            all[name] = field.description;
            all[name]["required"] = field.required;
        }
        return all;
    }

    /// The shortest request that the bundle takes.
    Request shortest() const {
        Request request;
        for (const auto& [name, field] : fields_)
            if (field.description["minimum"] <= 0) field.set(request, 0);
        if (fields_.count("num_inference_steps") != 0) request.num_inference_steps = 1;
        return request;
    }

   private:
    struct Field {
        bool required;
        Json description;
        std::function<void(Request&, const Json&)> set;
    };

    static constexpr std::uint64_t last_seed = std::numeric_limits<std::uint64_t>::max();
    // More than any guidance, and finite in float.
    static constexpr double largest_scale = 1e6;

    void add(const std::string& name, bool required, Json description,
             std::function<void(Request&, const Json&)> set) {
        fields_[name] = {required, std::move(description), std::move(set)};
    }

    void add_integer(const std::string& name, bool required, std::int64_t low, std::int64_t high,
                     std::function<void(Request&, std::int64_t)> set) {
        add(name, required, {{"type", "integer"}, {"minimum", low}, {"maximum", high}},
            [=](Request& request, const Json& value) {
                const bool fits = value.is_number_unsigned()
                                      ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(high)
                                      : value.is_number_integer() && value.get<std::int64_t>() <= high;
                if (!fits || value.get<std::int64_t>() < low)
                    throw BadRequest(fastddim::detail::text(name, ": ", shown(value), "; pass an integer in [", low,
                                                            ", ", high, "]"));
                set(request, value.get<std::int64_t>());
            });
    }

    void add_number(const std::string& name, bool required, double low, double high,
                    std::function<void(Request&, double)> set) {
        add(name, required, {{"type", "number"}, {"minimum", low}, {"maximum", high}},
            [=](Request& request, const Json& value) {
                if (!value.is_number() || !(value.get<double>() >= low && value.get<double>() <= high))
                    throw BadRequest(fastddim::detail::text(name, ": ", shown(value), "; pass a number in [", low,
                                                            ", ", high, "]"));
                set(request, value.get<double>());
            });
    }

    void add_condition(const fastddim::Bundle& bundle, const fastddim::TensorInfo& info) {
        const auto fail = [&](const std::string& what) {
            throw fastddim::BundleError("bundle: '" + bundle.path.string() + "' has an input '" + info.name + "', " +
                                        what);
        };
        const bool guided = bundle.manifest.find_taken("uncond_" + info.name) != nullptr;
        if (guided && bundle.manifest.sampling.null_values.count(info.name) == 0)
            fail("and no value for its unconditional half; this server takes bundles that have one");
        const bool scalar = info.shape.size() == 1 && info.shape[0].name == "batch";
        const auto set = [name = info.name](Request& request, auto value) { request.conditions[name] = value; };
        if (scalar && (info.dtype == "int64" || info.dtype == "int32")) {
            add_integer(info.name, true, 0, std::numeric_limits<std::int32_t>::max(), set);
        } else if (scalar && (info.dtype == "float32" || info.dtype == "float64")) {
            const double most = std::numeric_limits<float>::max();
            add_number(info.name, true, -most, most, set);
        } else {
            fail(info.dtype + " of shape " + fastddim::detail::shown(info.shape) +
                 "; this server takes models that are conditioned on one number a sample");
        }
    }

    static std::uint64_t to_seed(const Json& value) {
        if (value.is_number_unsigned()) return value.get<std::uint64_t>();
        // What was built from an int is no unsigned number, even where it is none below 0.
        if (value.is_number_integer() && value.get<std::int64_t>() >= 0) return value.get<std::uint64_t>();
        if (value.is_string()) {
            const auto& text = value.get_ref<const std::string&>();
            std::uint64_t seed = 0;
            const char* end = text.data() + text.size();
            const auto [last, error] = std::from_chars(text.data(), end, seed);
            if (error == std::errc{} && last == end) return seed;
        }
        throw BadRequest("seed: " + shown(value) + "; pass an integer in [0, 2**64), or a string of one");
    }

    /// Throws BadRequest, and reads no further: no JSON, an unknown name, one given twice, or anything nested.
    Json parse(const std::string& body) const {
        std::set<std::string> seen;
        std::string name = "body";
        const auto watch = [&](int depth, Json::parse_event_t event, const Json& parsed) {
            if (event == Json::parse_event_t::key) {
                name = parsed.get<std::string>();
                if (fields_.count(name) == 0)
                    throw BadRequest(shown(parsed) + ": no such field; this bundle has " + names());
                if (!seen.insert(name).second) throw BadRequest(name + ": given twice; pass it once");
            }
            if (depth > 0 && (event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start))
                throw BadRequest(name + ": an object or array; pass one value");
            return true;
        };
        // The parser would end there.
        if (body.find('\0') != std::string::npos) throw BadRequest("body: a NUL byte; pass a JSON object");
        try {
            return Json::parse(body, watch);
        } catch (const Json::exception& error) {
            const std::string what = error.what();
            throw BadRequest("body: " + what.substr(std::min(what.find("] ") + 2, what.size()), 200) +
                             "; pass a JSON object");
        }
    }

    std::string names() const {
        std::string all;
        for (const auto& [name, field] : fields_) all += (all.empty() ? "" : ", ") + name;
        return all;
    }

    std::map<std::string, Field> fields_;
};

}  // namespace server
