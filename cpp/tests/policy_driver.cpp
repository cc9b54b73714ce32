// A PolicySampler for the Python tests: JSON requests on the standard input, one a line, a line of JSON for each.
//   {"load": FOLDER}            the sampler of the requests that follow
//   {"sample": {...}}           observations by name, seed or noise, num_inference_steps, ddim, eta, strength, previous and
//                               shift, known and mask, late; the answer has the chunk, and what the call after it allocated
//                               and locked outside of ONNX Runtime
//   {"queue": {...}}            an ActionQueue over `ticks`, each the observations by name: lead, commit, strength, seed; the
//                               answer has the actions, and what all but the first chunk's ticks allocated and locked
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/action_queue.hpp"

namespace {

using Json = nlohmann::json;

std::atomic<bool> counting{false};
std::atomic<int> allocations{0}, locks{0};

/// Whether a return address lies in this program, rather than in a library.
bool is_ours(const void* address) {
    static const void* const base = [] {
        Dl_info info{};
        dladdr(reinterpret_cast<const void*>(&counting), &info);
        return static_cast<const void*>(info.dli_fbase);
    }();
    Dl_info info{};
    return dladdr(address, &info) != 0 && info.dli_fbase == base;
}

}  // namespace

// Not inlined, or the compiler sees `free` called on what `new` gave.
[[gnu::noinline]] void* operator new(std::size_t size) {
    if (counting && is_ours(__builtin_return_address(0))) ++allocations;
    if (void* const memory = std::malloc(size == 0 ? 1 : size)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
    using Lock = int (*)(pthread_mutex_t*);
    static const auto own = reinterpret_cast<Lock>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
    if (counting && is_ours(__builtin_return_address(0))) ++locks;
    return own(mutex);
}

namespace {

template <class T>
std::vector<T> numbers(const Json& call, const char* name) {
    return call.contains(name) ? call.at(name).get<std::vector<T>>() : std::vector<T>{};
}

template <class T>
void write(fastddim::PolicySampler& policy, const std::string& name, const Json& values) {
    const fastddim::Span<T> to = policy.observation<T>(name);
    const auto given = values.get<std::vector<double>>();
    if (given.size() != to.size) throw std::invalid_argument(name + ": another number of values");
    for (std::size_t k = 0; k < to.size; ++k) to[k] = static_cast<T>(given[k]);
}

Json sample(fastddim::PolicySampler& policy, const Json& call) {
    fastddim::PolicySteps steps;
    if (call.contains("num_inference_steps")) steps.num_inference_steps = call.at("num_inference_steps");
    if (call.contains("eta")) steps.eta = call.at("eta");
    steps.ddim = call.value("ddim", false);
    steps.strength = call.value("strength", 1.0);
    fastddim::PolicySampler::Run run = policy.prepare(steps);
    for (const auto& [name, values] : call.at("observations").items())
        write<float>(policy, name, values);
    const auto noise = numbers<float>(call, "noise"), previous = numbers<float>(call, "previous"), known = numbers<float>(call, "known");
    const auto mask_bytes = numbers<int>(call, "mask");
    const std::unique_ptr<bool[]> mask(new bool[mask_bytes.size()]);
    for (std::size_t k = 0; k < mask_bytes.size(); ++k) mask[k] = mask_bytes[k] != 0;
    fastddim::PolicyCall one;
    one.seed = call.value("seed", std::uint64_t{0});
    if (!noise.empty()) one.noise = noise.data();
    if (!previous.empty()) one.previous = previous.data();
    one.shift = call.value("shift", std::size_t{0});
    if (!known.empty()) one.known = known.data();
    if (!mask_bytes.empty()) one.mask = mask.get();
    if (call.value("late", false)) one.deadline = std::chrono::steady_clock::now();
    policy.sample(run, one);
    allocations = locks = 0;
    counting = true;
    policy.sample(run, one);
    counting = false;
    const auto listed = [](fastddim::Span<const float> values) { return std::vector<float>(values.begin(), values.end()); };
    return {{"actions", listed(policy.actions())}, {"normalised", listed(policy.normalised())},
            {"samples", listed(policy.samples())}, {"allocations", allocations.load()}, {"locks", locks.load()},
            {"steps", run.num_steps()}};
}

Json queue(fastddim::PolicySampler& policy, const Json& call) {
    fastddim::ActionQueueOptions options;
    options.lead = call.value("lead", std::size_t{0});
    options.commit = call.value("commit", false);
    options.seed = call.value("seed", std::uint64_t{0});
    options.steps.strength = call.value("strength", 1.0);
    fastddim::ActionQueue actions(policy, options);
    std::vector<std::vector<std::pair<fastddim::Span<float>, std::vector<float>>>> ticks;
    for (const Json& tick : call.at("ticks")) {
        auto& each = ticks.emplace_back();
        for (const auto& [name, values] : tick.items())
            each.emplace_back(actions.observation<float>(name), values.get<std::vector<float>>());
    }
    const auto warm = static_cast<std::size_t>(policy.policy().n_action_steps);
    std::vector<std::vector<float>> executed(ticks.size(), std::vector<float>(static_cast<std::size_t>(policy.policy().action_dim)));
    allocations = locks = 0;
    for (std::size_t k = 0; k < ticks.size(); ++k) {
        for (const auto& [to, values] : ticks[k]) std::copy(values.begin(), values.end(), to.begin());
        counting = k >= warm;
        const fastddim::Span<const float> action = actions.act();
        counting = false;
        std::copy(action.begin(), action.end(), executed[k].begin());
    }
    return {{"actions", executed}, {"allocations", allocations.load()}, {"locks", locks.load()}};
}

}  // namespace

int main() {
    std::unique_ptr<fastddim::PolicySampler> policy;
    for (std::string line; std::getline(std::cin, line);) {
        Json answer;
        try {
            const Json request = Json::parse(line);
            if (request.contains("load")) {
                Ort::SessionOptions options;
                options.SetIntraOpNumThreads(1);
                policy = std::make_unique<fastddim::PolicySampler>(
                    fastddim::open_bundle(request.at("load").get<std::string>()), options);
                answer = Json::object();
            } else if (request.contains("queue")) {
                answer = queue(*policy, request.at("queue"));
            } else {
                answer = sample(*policy, request.at("sample"));
            }
        } catch (const std::exception& error) {
            counting = false;
            answer = {{"error", error.what()}};
        }
        std::cout << answer << std::endl;
    }
}
