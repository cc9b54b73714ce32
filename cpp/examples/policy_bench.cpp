// How long a robot policy's chunk takes, and how well a control loop keeps its rate.
#include <time.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "fastddim/action_queue.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double milliseconds(Clock::duration time) { return std::chrono::duration<double, std::milli>(time).count(); }

/// p50, p99 and the worst of what was measured, in a line.
void print(const char* what, std::vector<double> times) {
    std::sort(times.begin(), times.end());
    const auto at = [&](double part) { return times[static_cast<std::size_t>(part * static_cast<double>(times.size() - 1))]; };
    std::printf("%s: p50 %.3f ms, p99 %.3f ms, worst %.3f ms (%zu)\n", what, at(0.5), at(0.99), times.back(), times.size());
}

/// How often a time was below each of some bounds, each a line with a bar.
void print_histogram(const std::vector<double>& times) {
    constexpr std::array<double, 8> bounds{0.05, 0.1, 0.2, 0.5, 1, 2, 5, 1e9};
    double below = 0;
    for (const double bound : bounds) {
        const auto count = std::count_if(times.begin(), times.end(), [&](double t) { return t >= below && t < bound; });
        const auto width = static_cast<int>(50.0 * static_cast<double>(count) / static_cast<double>(times.size()) + 0.5);
        if (bound < 1e9) {
            std::printf("  < %4.2f ms %7ld %s\n", bound, static_cast<long>(count), std::string(static_cast<std::size_t>(width), '#').c_str());
        } else {
            std::printf(" >= %4.2f ms %7ld %s\n", below, static_cast<long>(count), std::string(static_cast<std::size_t>(width), '#').c_str());
        }
        below = bound;
    }
}

/// The same observations each time, of standard normal numbers or mid-grey pictures.
template <class Owner>
void fill(Owner& owner, const fastddim::Manifest& manifest) {
    for (const auto& each : manifest.policy->observations) {
        if (manifest.find_taken(each.name)->dtype == "uint8") {
            for (std::uint8_t& pixel : owner.template observation<std::uint8_t>(each.name)) pixel = 128;
            continue;
        }
        const auto values = owner.template observation<float>(each.name);
        if (each.image) {
            std::fill(values.begin(), values.end(), 0.5F);
        } else {
            fastddim::normal(1, 0, fastddim::Stream::initial, values.size, values.data);
        }
    }
}

struct Settings {
    std::uint64_t chunks = 1000;
    std::size_t cycles = 500, lead = 3;
    int rate = 50, threads = 1;
    std::int64_t steps = 0;
};

void run(const std::filesystem::path& bundle, const Settings& settings) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(settings.threads);
    fastddim::PolicySampler policy(fastddim::open_bundle(bundle), options);
    const fastddim::Manifest& manifest = policy.bundle().manifest;
    fastddim::PolicySteps steps;
    if (settings.steps != 0) steps.num_inference_steps = settings.steps;
    fastddim::PolicySampler::Run whole = policy.prepare(steps);
    fill(policy, manifest);
    std::vector<double> times;
    fastddim::PolicyCall call;
    for (std::uint64_t k = 0; k < settings.chunks + 20; ++k) {
        call.seed = k;
        const Clock::time_point begin = Clock::now();
        policy.sample(whole, call);
        // The first ones warm up.
        if (k >= 20) times.push_back(milliseconds(Clock::now() - begin));
    }
    std::printf("%zu steps, %lld actions a chunk\n", whole.num_steps(), static_cast<long long>(manifest.policy->n_action_steps));
    print("a chunk", times);

    fastddim::ActionQueueOptions control;
    control.lead = settings.lead;
    control.steps = steps;
    fastddim::ActionQueue queue(policy, control);
    fill(queue, manifest);
    const auto period = static_cast<long>(1e9 / settings.rate);
    std::vector<double> late, took;
    late.reserve(settings.cycles);
    took.reserve(settings.cycles);
    timespec due{};
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (std::size_t cycle = 0; cycle < settings.cycles; ++cycle) {
        due.tv_nsec += period;
        due.tv_sec += due.tv_nsec / 1000000000L;
        due.tv_nsec %= 1000000000L;
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, nullptr) != 0) {
        }
        timespec now{};
        clock_gettime(CLOCK_MONOTONIC, &now);
        late.push_back(1e3 * static_cast<double>(now.tv_sec - due.tv_sec) + 1e-6 * static_cast<double>(now.tv_nsec - due.tv_nsec));
        const Clock::time_point begin = Clock::now();
        queue.act();
        took.push_back(milliseconds(Clock::now() - begin));
    }
    std::printf("%zu control cycles at %d Hz, the next chunk begun %zu before this one ends\n", settings.cycles, settings.rate,
                control.lead);
    print("an action after its observation", took);
    print("a cycle after its time", late);
    print_histogram(late);
}

}  // namespace

int main(int count, char** words) {
    Settings settings;
    const std::vector<arguments::Option> options{
        arguments::integer("--chunks", "how many chunks to time", settings.chunks, std::uint64_t{1}),
        arguments::integer("--cycles", "control cycles", settings.cycles, std::size_t{1}),
        arguments::integer("--rate", "of control, in Hz", settings.rate, 1, 100000),
        arguments::integer("--lead", "cycles before a chunk's end to begin the next one", settings.lead, std::size_t{0}),
        arguments::integer("--steps", "of a chunk's run; 0 is the bundle's own", settings.steps, std::int64_t{0}),
        arguments::integer("--threads", "ONNX Runtime's", settings.threads, 1),
    };
    return arguments::run({words + 1, words + count}, "policy_bench",
                          "How long a robot policy's chunk takes, and how well a control loop keeps its rate.", options,
                          [&](const std::filesystem::path& bundle) { run(bundle, settings); });
}
