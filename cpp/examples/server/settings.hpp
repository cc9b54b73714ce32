// The server's command line.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../arguments.hpp"

namespace server {

struct Settings {
    using Duration = std::chrono::milliseconds;

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

/// An option for a time in seconds, to the millisecond.
inline arguments::Option seconds(const std::string& name, const std::string& meaning, Settings::Duration& to) {
    return {name, "SECONDS", meaning + " [" + std::to_string(to.count() / 1000) + "]",
            [=, &to](const std::string& text) {
                const double value = arguments::number(name, text, "seconds in [0.001, 86400]", 0.001, 86400.0);
                to = Settings::Duration(static_cast<std::int64_t>(value * 1000));
            }};
}

/// The options that set `settings`, which must outlive them.
inline std::vector<arguments::Option> options_of(Settings& settings) {
    using arguments::integer;
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

}  // namespace server
