// sample BUNDLE [options]: pictures from an exported bundle, side by side in a PGM or PPM file, or their raw floats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "arguments.hpp"
#include "fastddim/ort_sampler.hpp"

namespace {

struct Settings {
    std::filesystem::path out = "samples.pgm";
    int threads = 0;
    fastddim::Call call;
};

std::vector<std::int64_t> integers(const std::string& option, const std::string& text) {
    std::vector<std::int64_t> values;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');)
        values.push_back(arguments::number<std::int64_t>(option, part, "an integer"));
    return values;
}

/// The options that set `settings`, which must outlive them.
std::vector<arguments::Option> options_of(Settings& settings) {
    using arguments::number;
    fastddim::Call& call = settings.call;
    return {
        {"--out", "FILE", "a picture, .pgm or .ppm, or raw floats, .raw [samples.pgm]",
         [&](const std::string& text) { settings.out = text; }},
        {"--seed", "N", "the first sample's seed [0]",
         [&](const std::string& text) { call.seeds = number<std::uint64_t>("--seed", text, "an integer in [0, 2**64)"); }},
        {"--batch", "N", "samples [1]",
         [&](const std::string& text) { call.batch = number<std::int64_t>("--batch", text, "an integer"); }},
        {"--labels", "N,N,...", "a class for each sample",
         [&](const std::string& text) {
             const std::vector<std::int64_t> labels = integers("--labels", text);
             call.batch = static_cast<std::int64_t>(labels.size());
             call.conditions["class_labels"] = fastddim::Array<std::int64_t>{{call.batch}, labels};
         }},
        {"--steps", "N", "model calls [the bundle's]",
         [&](const std::string& text) {
             call.num_inference_steps = number<std::int64_t>("--steps", text, "an integer");
         }},
        {"--eta", "X", "noise of the steps, in [0, 1] [the bundle's]",
         [&](const std::string& text) { call.eta = number<double>("--eta", text, "a number"); }},
        {"--guidance-scale", "X", "for bundles with guidance [2]",
         [&](const std::string& text) { call.guidance_scale = {number<float>("--guidance-scale", text, "a number")}; }},
        {"--size", "HEIGHT,WIDTH", "for bundles that take several [the bundle's]",
         [&](const std::string& text) {
             const std::vector<std::int64_t> size = integers("--size", text);
             if (size.size() != 2) throw std::invalid_argument("--size: '" + text + "'; pass HEIGHT,WIDTH");
             call.size = {size[0], size[1]};
         }},
        {"--threads", "N", "ONNX Runtime's; 0 is its choice [0]",
         [&](const std::string& text) { settings.threads = number<int>("--threads", text, "an integer"); }},
    };
}

/// A binary PGM or PPM of all samples side by side; [-1, 1] becomes black to white.
std::string picture(const fastddim::Array<float>& samples) {
    if (samples.shape.size() != 4 || (samples.shape[1] != 1 && samples.shape[1] != 3))
        throw std::invalid_argument("--out: these samples are no pictures; pass a file that ends in .raw");
    const auto size = [&](std::size_t dim) { return static_cast<std::size_t>(samples.shape[dim]); };
    const std::size_t batch = size(0), channels = size(1), height = size(2), width = size(3);
    std::string pixels = (channels == 1 ? "P5\n" : "P6\n") + std::to_string(batch * width) + " " +
                         std::to_string(height) + "\n255\n";
    for (std::size_t y = 0; y < height; ++y)
        for (std::size_t k = 0; k < batch; ++k)
            for (std::size_t x = 0; x < width; ++x)
                for (std::size_t c = 0; c < channels; ++c) {
                    const float value = samples.values[((k * channels + c) * height + y) * width + x];
                    const float level = std::clamp((value + 1.0F) * 127.5F, 0.0F, 255.0F);
                    pixels += static_cast<char>(static_cast<unsigned char>(std::nearbyint(level)));
                }
    return pixels;
}

/// Whole or not at all: what was there stays until the new file is complete.
void write(const std::filesystem::path& path, const std::string& content) {
    std::filesystem::path part = path;
    part += ".part";
    std::ofstream stream(part, std::ios::binary);
    stream.write(content.data(), static_cast<std::streamsize>(content.size()));
    stream.close();
    std::error_code failed;
    if (stream) std::filesystem::rename(part, path, failed);
    if (!stream || failed) {
        std::filesystem::remove(part, failed);
        throw std::runtime_error("--out: '" + path.string() + "' cannot be written; pass another file");
    }
}

void sample(const std::filesystem::path& bundle, const Settings& settings) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(settings.threads);
    const fastddim::OrtSampler sampler(fastddim::open_bundle(bundle), options);
    fastddim::Call call = settings.call;
    if (sampler.bundle().manifest.sampling.guided && call.guidance_scale.empty()) call.guidance_scale = {2.0F};
    const fastddim::Array<float> samples = sampler(call);
    if (settings.out.extension() == ".raw") {
        const auto* bytes = reinterpret_cast<const char*>(samples.values.data());
        write(settings.out, {bytes, samples.values.size() * sizeof(float)});
    } else {
        write(settings.out, picture(samples));
    }
}

}  // namespace

int main(int count, char** words) {
    Settings settings;
    settings.call.seeds = 0;
    return arguments::run({words + 1, words + count}, "sample",
                          "Pictures from an exported bundle, side by side in one file.", options_of(settings),
                          [&](const std::filesystem::path& bundle) { sample(bundle, settings); });
}
