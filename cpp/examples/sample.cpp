// sample BUNDLE [options]: pictures from an exported bundle, side by side in a PGM or PPM file, or their raw floats.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastddim/ort_sampler.hpp"

namespace {

constexpr const char* usage =
    "usage: sample BUNDLE [--out FILE.pgm|.ppm|.raw] [--seed N] [--batch N] [--labels N,N,...] [--steps N]\n"
    "              [--eta X] [--guidance-scale X] [--size HEIGHT,WIDTH] [--threads N]\n";

struct Arguments {
    std::filesystem::path bundle;
    std::filesystem::path out = "samples.pgm";
    int threads = 0;
    bool help = false;
    fastddim::Call call;
};

template <class T>
T number(const std::string& option, const std::string& text) {
    T value{};
    const char* end = text.data() + text.size();
    const auto [last, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc{} || last != end)
        throw std::invalid_argument(option + ": '" + text + "'; pass " +
                                    (std::is_unsigned_v<T> ? "an integer in [0, 2**64)"
                                     : std::is_integral_v<T> ? "an integer"
                                                             : "a number"));
    return value;
}

std::vector<std::int64_t> integers(const std::string& option, const std::string& text) {
    std::vector<std::int64_t> values;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) values.push_back(number<std::int64_t>(option, part));
    return values;
}

Arguments parse(const std::vector<std::string>& words) {
    Arguments arguments;
    fastddim::Call& call = arguments.call;
    call.seeds = 0;
    for (std::size_t k = 0; k < words.size(); ++k) {
        const std::string& option = words[k];
        if (option == "--help" || option == "-h") {
            arguments.help = true;
            return arguments;
        }
        if (option.rfind("--", 0) != 0) {
            if (!arguments.bundle.empty()) throw std::invalid_argument("'" + option + "': a second bundle; pass one");
            arguments.bundle = option;
            continue;
        }
        if (++k == words.size()) throw std::invalid_argument(option + ": no value; pass one");
        const std::string& value = words[k];
        if (option == "--out") {
            arguments.out = value;
        } else if (option == "--seed") {
            call.seeds = number<std::uint64_t>(option, value);
        } else if (option == "--batch") {
            call.batch = number<std::int64_t>(option, value);
        } else if (option == "--labels") {
            const std::vector<std::int64_t> labels = integers(option, value);
            call.batch = static_cast<std::int64_t>(labels.size());
            call.conditions["class_labels"] = fastddim::Array<std::int64_t>{{call.batch}, labels};
        } else if (option == "--steps") {
            call.num_inference_steps = number<std::int64_t>(option, value);
        } else if (option == "--eta") {
            call.eta = number<double>(option, value);
        } else if (option == "--guidance-scale") {
            call.guidance_scale = {number<float>(option, value)};
        } else if (option == "--size") {
            const std::vector<std::int64_t> size = integers(option, value);
            if (size.size() != 2) throw std::invalid_argument("--size: '" + value + "'; pass HEIGHT,WIDTH");
            call.size = {size[0], size[1]};
        } else if (option == "--threads") {
            arguments.threads = number<int>(option, value);
        } else {
            throw std::invalid_argument(option + ": no such option\n" + usage);
        }
    }
    if (arguments.bundle.empty()) throw std::invalid_argument(std::string("BUNDLE: missing\n") + usage);
    return arguments;
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

void run(const Arguments& arguments) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(arguments.threads);
    const fastddim::OrtSampler sampler(fastddim::open_bundle(arguments.bundle), options);
    fastddim::Call call = arguments.call;
    if (sampler.bundle().manifest.sampling.guided && call.guidance_scale.empty()) call.guidance_scale = {2.0F};
    const fastddim::Array<float> samples = sampler(call);
    if (arguments.out.extension() == ".raw") {
        const auto* bytes = reinterpret_cast<const char*>(samples.values.data());
        write(arguments.out, {bytes, samples.values.size() * sizeof(float)});
    } else {
        write(arguments.out, picture(samples));
    }
}

}  // namespace

int main(int count, char** words) {
    try {
        const Arguments arguments = parse({words + 1, words + count});
        if (arguments.help) {
            std::cout << usage;
        } else {
            run(arguments);
        }
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
