// Counters in Prometheus' text format.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <utility>

namespace server {

/// What the server counts; of one thread.
class Metrics {
   public:
    /// What is, not what was.
    struct Gauges {
        std::size_t queued, in_flight, connections;
    };

    /// labels: of `fastddim_build_info`, by name; their values have no quotes.
    explicit Metrics(const std::map<std::string, std::string>& labels) {
        for (const auto& [name, value] : labels) build_ += (build_.empty() ? "" : ",") + name + "=\"" + value + "\"";
    }

    void count_request(const std::string& path, unsigned status) { ++requests_[{path, status}]; }

    /// A picture's time from its request's arrival to its answer.
    void observe_latency(double seconds) {
        for (std::size_t k = 0; k < bounds.size(); ++k)
            if (seconds <= bounds[k]) ++buckets_[k];
        ++pictures_;
        latency_ += seconds;
    }

    void add_sampling(double seconds) { sampling_ += seconds; }
    void count_abandoned() { ++abandoned_; }
    void count_refused_connection() { ++refused_connections_; }

    std::string text(const Gauges& gauges) const {
        std::ostringstream out;
        out.precision(17);
        const auto head = [&](const char* name, const char* type, const char* help) {
            out << "# HELP " << name << " " << help << "\n# TYPE " << name << " " << type << "\n";
        };
        const auto single = [&](const char* name, const char* type, const char* help, auto value) {
            head(name, type, help);
            out << name << " " << value << "\n";
        };
        head("fastddim_requests_total", "counter", "Answers, by path and status.");
        for (const auto& [key, count] : requests_)
            out << "fastddim_requests_total{path=\"" << key.first << "\",status=\"" << key.second << "\"} " << count
                << "\n";
        single("fastddim_queue_length", "gauge", "Requests that wait to be sampled.", gauges.queued);
        single("fastddim_in_flight", "gauge", "Requests that are being sampled.", gauges.in_flight);
        single("fastddim_connections", "gauge", "Open connections.", gauges.connections);
        single("fastddim_connections_refused_total", "counter", "Connections past the limit.", refused_connections_);
        single("fastddim_abandoned_total", "counter", "Requests whose client left before the answer.", abandoned_);
        single("fastddim_sampling_seconds_total", "counter", "Time of runs.", sampling_);
        head("fastddim_latency_seconds", "histogram", "From a request's arrival to its picture.");
        for (std::size_t k = 0; k < bounds.size(); ++k) {
            std::ostringstream bound;
            bound << bounds[k];
            out << "fastddim_latency_seconds_bucket{le=\"" << bound.str() << "\"} " << buckets_[k] << "\n";
        }
        out << "fastddim_latency_seconds_bucket{le=\"+Inf\"} " << pictures_ << "\n"
            << "fastddim_latency_seconds_sum " << latency_ << "\n"
            << "fastddim_latency_seconds_count " << pictures_ << "\n";
        head("fastddim_build_info", "gauge", "Versions.");
        out << "fastddim_build_info{" << build_ << "} 1\n";
        return out.str();
    }

   private:
    static constexpr std::array<double, 12> bounds{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30};

    std::string build_;
    std::map<std::pair<std::string, unsigned>, std::uint64_t> requests_;
    std::array<std::uint64_t, bounds.size()> buckets_{};
    std::uint64_t pictures_ = 0, abandoned_ = 0, refused_connections_ = 0;
    double latency_ = 0, sampling_ = 0;
};

}  // namespace server
