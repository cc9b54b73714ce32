// Any bytes as a manifest: it is read, or refused with a BundleError; its schedule gives a table, or says why not.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    // Large schedules take long and show nothing new.
    constexpr std::int64_t most = 4096;
    try {
        const auto manifest = fastddim::parse_manifest({reinterpret_cast<const char*>(data), size});
        if (manifest.schedule.num_train_timesteps > most) return 0;
        const fastddim::Schedule schedule(manifest.schedule);
        fastddim::Call call;
        call.seeds = 0;
        call.eta = manifest.sampling.stochastic ? 1.0 : 0.0;
        call.guidance_scale = {2.0F};
        std::size_t count = 1;
        for (const std::int64_t dim : manifest.sample.shape)
            count = std::min(count * static_cast<std::size_t>(std::min(dim, most)), std::size_t{1} << 24);
        if (count <= 1U << 16) fastddim::prepare(manifest, schedule, call);
    } catch (const fastddim::BundleError&) {
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
