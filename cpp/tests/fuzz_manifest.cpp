// Any bytes as a manifest, or as a kernel.json: it is read, or refused with a BundleError; a manifest's schedule gives a
// table, or says why not.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <string>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"
#include "fastddim/kernel_bundle.hpp"

extern "C" {
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned int seed);
std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);
}

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    // Large samples take long and show nothing new.
    constexpr std::int64_t most = 4096;
    const std::string text(reinterpret_cast<const char*>(data), size);
    try {
        if (text.find("fastddim-kernels") != std::string::npos) {
            fastddim::parse_kernel_manifest(text);
            return 0;
        }
        const auto manifest = fastddim::parse_manifest(text);
        fastddim::Call call;
        call.seeds = 0;
        if (manifest.scheduling) {
            if (manifest.scheduling->eta()) call.eta = manifest.sampling.stochastic ? 1.0 : 0.0;
            call.num_inference_steps = std::min(manifest.most_steps(), std::int64_t{7});
        }
        call.guidance_scale = {2.0F};
        std::size_t count = 1;
        for (const std::int64_t dim : manifest.sample.shape)
            count = std::min(count * static_cast<std::size_t>(std::min(dim, most)), std::size_t{1} << 24);
        if (count <= 1U << 16) fastddim::prepare(manifest, call);
    } catch (const fastddim::BundleError&) {
    } catch (const std::invalid_argument&) {
    }
    return 0;
}

/// Mostly another value, or none, somewhere in the JSON, so that what follows the parser is reached.
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned int seed) {
    using Json = nlohmann::json;
    std::minstd_rand draw(seed);
    const auto below = [&](std::size_t count) { return static_cast<std::size_t>(draw()) % count; };
    Json json = Json::parse(data, data + size, nullptr, false);
    if (json.is_discarded() || !json.is_structured() || json.empty() || below(8) == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    const Json other = *std::next(json.begin(), static_cast<std::ptrdiff_t>(below(json.size())));
    Json* parent = &json;
    auto child = std::next(json.begin(), static_cast<std::ptrdiff_t>(below(json.size())));
    while (child->is_structured() && !child->empty() && below(5) != 0) {
        parent = &*child;
        child = std::next(parent->begin(), static_cast<std::ptrdiff_t>(below(parent->size())));
    }
    const std::array<Json, 17> values{nullptr, true, false,    0,       1,    -1,   2,     1000, 987.6,
                                      0.5,     1e308, INT64_MAX, UINT64_MAX, "", "..", "batch", other};
    const std::size_t choice = below(values.size() + 2);
    if (choice < values.size()) {
        *child = values[choice];
    } else if (choice == values.size()) {
        parent->erase(child);
    } else if (parent->is_array()) {
        parent->push_back(Json(*child));
    }
    const std::string text = json.dump();
    if (text.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
    std::copy(text.begin(), text.end(), data);
    return text.size();
}
