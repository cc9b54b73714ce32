// Samples as PNG files.
#pragma once

#include <png.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"

namespace server {

/// How a bundle's samples become pictures.
class PictureFormat {
   public:
    /// Throws BundleError: its samples are neither grey nor RGB, or have an empty range.
    explicit PictureFormat(const fastddim::Bundle& bundle) {
        const fastddim::Manifest::Sample& sample = bundle.manifest.sample;
        if (sample.layout != "NCHW" || sample.shape.size() != 3 || (sample.shape[0] != 1 && sample.shape[0] != 3))
            throw fastddim::BundleError("bundle: '" + bundle.path.string() + "' makes samples " +
                                        fastddim::detail::shown(sample.shape) + " (" + sample.layout +
                                        "), which are no pictures; pass one with 1 or 3 channels");
        range_ = sample.range.value_or(std::array<double, 2>{-1, 1});
        if (range_[0] >= range_[1])
            throw fastddim::BundleError("bundle: '" + bundle.path.string() + "' has an empty range; export it again");
    }

    /// The PNG file of one sample of a batch `[B, C, H, W]`; what is out of range is clipped.
    std::string encode(const fastddim::Array<float>& samples, std::size_t index) const {
        const auto channels = static_cast<std::size_t>(samples.shape[1]),
                   count = static_cast<std::size_t>(samples.shape[2] * samples.shape[3]);
        const float* values = samples.values.data() + index * channels * count;
        const auto low = static_cast<float>(range_[0]), scale = static_cast<float>(255 / (range_[1] - range_[0]));
        std::vector<unsigned char> pixels(channels * count);
        for (std::size_t channel = 0; channel < channels; ++channel)
            for (std::size_t k = 0; k < count; ++k) {
                const float level = std::clamp((values[channel * count + k] - low) * scale, 0.0F, 255.0F);
                pixels[k * channels + channel] = static_cast<unsigned char>(std::nearbyint(level));
            }
        png_image image{};
        image.version = PNG_IMAGE_VERSION;
        image.format = channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
        image.height = static_cast<png_uint_32>(samples.shape[2]);
        image.width = static_cast<png_uint_32>(samples.shape[3]);
        image.flags = PNG_IMAGE_FLAG_FAST;
        std::string file(PNG_IMAGE_PNG_SIZE_MAX(image), '\0');
        png_alloc_size_t size = file.size();
        if (png_image_write_to_memory(&image, file.data(), &size, 0, pixels.data(), 0, nullptr) == 0)
            throw std::runtime_error(std::string("PNG: ") + image.message);
        file.resize(size);
        return file;
    }

   private:
    std::array<double, 2> range_{};
};

}  // namespace server
