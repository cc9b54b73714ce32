// The server's command line.
#pragma once

#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace server {

struct Settings {
    using Duration = std::chrono::milliseconds;

    std::filesystem::path bundle;
    bool help = false;
    std::string host = "127.0.0.1";
    std::uint16_t port = 8080;
    int workers = 1;
    int threads = 0;
    std::size_t queue = 64;
    std::size_t max_batch = 4;
    std::int64_t max_steps = 1000;
    std::size_t max_body = 16384;
    std::size_t max_connections = 1000;
    Duration timeout{30'000};
    Duration read_timeout{10'000};
    Duration write_timeout{10'000};
    Duration idle_timeout{60'000};
};

namespace detail {

struct Option {
    const char* name;
    const char* value;
    std::string meaning;
    std::function<void(const std::string&)> set;
};

/// An option for an integer in [low, high].
template <class T>
Option integer(const char* name, const char* meaning, T& to, T low, T high = std::numeric_limits<T>::max()) {
    return {name, "N", std::string(meaning) + " [" + std::to_string(to) + "]", [=, &to](const std::string& text) {
                T value{};
                const char* end = text.data() + text.size();
                const auto [last, error] = std::from_chars(text.data(), end, value);
                if (error != std::errc{} || last != end || value < low || value > high)
                    throw std::invalid_argument(std::string(name) + ": '" + text + "'; pass an integer in [" +
                                                std::to_string(low) + ", " + std::to_string(high) + "]");
                to = value;
            }};
}

/// An option for a time in seconds, to the millisecond.
inline Option seconds(const char* name, const char* meaning, Settings::Duration& to) {
    return {name, "SECONDS", std::string(meaning) + " [" + std::to_string(to.count() / 1000) + "]",
            [=, &to](const std::string& text) {
                double value = 0;
                const char* end = text.data() + text.size();
                const auto [last, error] = std::from_chars(text.data(), end, value);
                if (error != std::errc{} || last != end || !(value >= 0.001 && value <= 86400))
                    throw std::invalid_argument(std::string(name) + ": '" + text +
                                                "'; pass seconds in [0.001, 86400]");
                to = Settings::Duration(static_cast<std::int64_t>(value * 1000));
            }};
}

inline std::vector<Option> options_of(Settings& settings) {
    return {
        {"--host", "ADDRESS", "the address to listen on [" + settings.host + "]",
         [&](const std::string& text) { settings.host = text; }},
        integer<std::uint16_t>("--port", "the port; 0 takes a free one", settings.port, 0),
        integer("--workers", "runs at a time", settings.workers, 1, 256),
        integer("--threads", "ONNX Runtime's threads for one run; 0 is its choice", settings.threads, 0, 256),
        integer<std::size_t>("--queue", "requests that may wait; the next gets a 503", settings.queue, 1, 1'000'000),
        integer<std::size_t>("--max-batch", "waiting requests of equal steps and eta that share a run",
                             settings.max_batch, 1, 1024),
        integer<std::int64_t>("--max-steps", "largest num_inference_steps", settings.max_steps, 1),
        integer<std::size_t>("--max-body", "largest body, in bytes", settings.max_body, 1, 1U << 30),
        integer<std::size_t>("--max-connections", "connections at a time", settings.max_connections, 1, 1'000'000),
        seconds("--timeout", "for a request to wait and be sampled", settings.timeout),
        seconds("--read-timeout", "for a request to arrive, from its first byte", settings.read_timeout),
        seconds("--write-timeout", "for a client to take an answer", settings.write_timeout),
        seconds("--idle-timeout", "until a connection without requests is closed", settings.idle_timeout),
    };
}

}  // namespace detail

inline std::string usage() {
    Settings defaults;
    std::ostringstream text;
    text << "usage: server BUNDLE [options]\n\nPictures from an exported bundle over HTTP; see cpp/README.md.\n\n";
    for (const detail::Option& option : detail::options_of(defaults)) {
        const std::string head = std::string(option.name) + " " + option.value;
        text << "  " << head << std::string(head.size() < 26 ? 26 - head.size() : 1, ' ') << option.meaning << "\n";
    }
    return text.str();
}

/// Throws std::invalid_argument: words that are no options, or values out of range.
inline Settings parse_settings(const std::vector<std::string>& words) {
    Settings settings;
    const std::vector<detail::Option> options = detail::options_of(settings);
    for (std::size_t k = 0; k < words.size(); ++k) {
        const std::string& word = words[k];
        if (word == "--help" || word == "-h") {
            settings.help = true;
            return settings;
        }
        if (word.rfind('-', 0) != 0) {
            if (!settings.bundle.empty()) throw std::invalid_argument("'" + word + "': a second bundle; pass one");
            settings.bundle = word;
            continue;
        }
        const detail::Option* found = nullptr;
        for (const detail::Option& option : options)
            if (word == option.name) found = &option;
        if (found == nullptr) throw std::invalid_argument(word + ": no such option; --help lists them");
        if (++k == words.size()) throw std::invalid_argument(word + ": no value; pass one");
        found->set(words[k]);
    }
    if (settings.bundle.empty())
        throw std::invalid_argument("BUNDLE: missing; pass a folder of `fastddim export` (--help lists options)");
    return settings;
}

}  // namespace server
