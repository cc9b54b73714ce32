// Noise, tables and digests for the Python tests: a request per line of the standard input, raw numbers on the output.
//   noise SEED STEP STREAM COUNT            float[COUNT]
//   table N_TRAIN START END BETAS PREDICTION SPACING OFFSET ALPHA_ONE ZERO_SNR ETA CLIPPED STEPS
//         TRAINED... . TIMESTEPS... .       int64 count, int64[count], double[count, 6], float[count, 6]; -1 if refused
//   method RECORD STEPS                     JSON of what Python's Sampling.record has, and of its Steps, on a line;
//         int64 count, columns, float timesteps; double start scale, noising[2], timesteps[count], rows[count, columns];
//         -1 if refused
//   sha256 FILE                             64 digits
//   rows STEPS BATCH DIM... . STEP... . SAMPLE... .
//         a value of a run, float32 numbers 0, 1, ..., for samples at steps of their own; int64 rank, int64[rank], float[...];
//         -1 if refused
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/philox.hpp"
#include "fastddim/run_values.hpp"
#include "fastddim/samplers.hpp"
#include "fastddim/schedule.hpp"
#include "fastddim/sha256.hpp"

namespace {

template <class T>
void put(const T* values, std::size_t count) {
    std::fwrite(values, sizeof(T), count, stdout);
}

std::string word() {
    std::string text;
    if (!(std::cin >> text)) throw std::runtime_error("the input ends within a request");
    return text;
}

// std::stod, as streams do not read numbers as Python writes the smallest.
double real() { return std::stod(word()); }
std::int64_t integer() { return std::stoll(word()); }

void noise() {
    const std::uint64_t seed = std::stoull(word());
    const auto step = static_cast<std::uint32_t>(integer());
    const auto stream = static_cast<fastddim::Stream>(integer());
    std::vector<float> values(static_cast<std::size_t>(integer()));
    fastddim::normal(seed, step, stream, values.size(), values.data());
    put(values.data(), values.size());
}

void table() {
    fastddim::DDIMConfig config;
    config.num_train_timesteps = integer();
    config.beta_start = real();
    config.beta_end = real();
    config.beta_schedule = static_cast<fastddim::BetaSchedule>(integer());
    config.prediction_type = static_cast<fastddim::PredictionType>(integer());
    config.timestep_spacing = static_cast<fastddim::TimestepSpacing>(integer());
    config.steps_offset = integer();
    config.set_alpha_to_one = integer() != 0;
    config.rescale_betas_zero_snr = integer() != 0;
    const double eta = real();
    const bool clipped = integer() != 0;
    const std::int64_t steps = integer();
    std::vector<double> trained;
    for (std::string text = word(); text != "."; text = word()) trained.push_back(std::stod(text));
    if (!trained.empty()) config.trained_betas = trained;
    std::vector<std::int64_t> timesteps;
    for (std::string text = word(); text != "."; text = word()) timesteps.push_back(std::stoll(text));
    std::int64_t count = -1;
    try {
        const fastddim::Schedule schedule(config);
        const auto transitions = timesteps.empty() ? schedule.transitions(steps) : schedule.transitions(timesteps);
        const auto built = fastddim::StepTable::build(schedule, transitions, eta, clipped);
        count = static_cast<std::int64_t>(built.size());
        put(&count, 1);
        const std::vector<unsigned char> called = built.timestep_bytes();
        put(called.data(), called.size());
        put(built.rows.data(), built.size());
        const std::vector<float> columns = built.columns();
        put(columns.data(), columns.size());
    } catch (const std::invalid_argument& error) {
        put(&count, 1);
        std::fprintf(stderr, "%s\n", error.what());
    }
}

template <class T>
void take(const nlohmann::json& json, const char* name, std::optional<T>& to) {
    if (json.contains(name) && !json.at(name).is_null()) to = json.at(name).get<T>();
}

void method() {
    std::string line;
    std::getline(std::cin, line);
    const nlohmann::json request = nlohmann::json::parse(line), given = request.at("steps");
    try {
        const std::string file = "request";
        const fastddim::Sampling sampling = fastddim::detail::parse_scheduling({request, file});
        fastddim::Steps steps;
        take(given, "num_inference_steps", steps.num_inference_steps);
        take(given, "timesteps", steps.timesteps);
        take(given, "sigmas", steps.sigmas);
        steps.strength = given.value("strength", 1.0);
        const fastddim::StepTable table = sampling.build(steps);
        const std::array<std::int64_t, 3> sizes{static_cast<std::int64_t>(table.size()),
                                                static_cast<std::int64_t>(table.num_columns()), table.float_timesteps};
        put(sizes.data(), sizes.size());
        put(&table.start_scale, 1);
        put(table.noising.value().data(), 2);
        put(table.timesteps.data(), table.size());
        for (std::size_t k = 0; k < table.size(); ++k) {
            put(table.rows[k].data(), table.rows[k].size());
            if (table.looks_back()) put(&table.next_from_previous_x0[k], 1);
        }
    } catch (const std::exception& error) {
        const std::int64_t refused = -1;
        put(&refused, 1);
        std::fprintf(stderr, "%s\n", error.what());
    }
}

std::vector<std::string> words() {
    std::vector<std::string> all;
    for (std::string next = word(); next != "."; next = word()) all.push_back(next);
    return all;
}

std::vector<std::size_t> sizes() {
    std::vector<std::size_t> all;
    for (const std::string& text : words()) all.push_back(std::stoull(text));
    return all;
}

void rows() {
    const std::int64_t steps = integer(), batch = integer();
    const std::map<std::string, std::int64_t> named{{"steps", steps}, {"batch", batch}};
    fastddim::TensorInfo info{"value", "float32", {}, ""};
    fastddim::Feed feed{"value", "float32", {}, {}};
    std::size_t count = 1;
    for (const std::string& dim : words()) {
        const auto name = named.find(dim);
        feed.shape.push_back(name == named.end() ? std::stoll(dim) : name->second);
        info.shape.push_back(name == named.end() ? fastddim::Dim{feed.shape.back(), ""} : fastddim::Dim{0, dim});
        count *= static_cast<std::size_t>(feed.shape.back());
    }
    std::vector<float> numbers(count);
    for (std::size_t k = 0; k < count; ++k) numbers[k] = static_cast<float>(k);
    const auto* const bytes = reinterpret_cast<const unsigned char*>(numbers.data());
    feed.bytes.assign(bytes, bytes + count * sizeof(float));
    const std::vector<std::size_t> chosen = sizes(), samples = sizes();
    try {
        const fastddim::RunValues values({std::move(feed)}, {info}, steps, batch);
        std::vector<fastddim::Feed> taken = values.of_steps(chosen, samples);
        for (fastddim::Feed& kept : values.of_samples(samples)) taken.push_back(std::move(kept));
        const auto rank = static_cast<std::int64_t>(taken.at(0).shape.size());
        put(&rank, 1);
        put(taken[0].shape.data(), taken[0].shape.size());
        put(taken[0].bytes.data(), taken[0].bytes.size());
    } catch (const std::exception& error) {
        const std::int64_t refused = -1;
        put(&refused, 1);
        std::fprintf(stderr, "%s\n", error.what());
    }
}

void digest() {
    std::ifstream file(word(), std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    fastddim::Sha256 sha;
    // In pieces of every size, so that they end on either side of a block's end.
    for (std::size_t first = 0, size = 1; first < content.size(); first += size, size = size % 131 + 1)
        sha.update(content.data() + first, std::min(size, content.size() - first));
    const std::string hex = sha.hex();
    put(hex.data(), hex.size());
}

}  // namespace

int main() {
    try {
        for (std::string request; std::cin >> request;) {
            if (request == "noise") {
                noise();
            } else if (request == "table") {
                table();
            } else if (request == "method") {
                method();
            } else if (request == "sha256") {
                digest();
            } else if (request == "rows") {
                rows();
            } else {
                throw std::runtime_error("no request '" + request + "'");
            }
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "numbers: %s\n", error.what());
        return 1;
    }
    return 0;
}
