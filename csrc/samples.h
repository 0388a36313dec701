// A few bytes of each of many blocks of memory, at another place each time: a write to most of a block shows in them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pysteep {

class Samples {
 public:
  static constexpr int64_t size = 32;  // bytes of a block

  Samples(const std::vector<int64_t>& addresses, const std::vector<int64_t>& sizes) {
    for (size_t i = 0; i < addresses.size(); ++i)
      samples_.push_back({reinterpret_cast<const unsigned char*>(addresses[i]), sizes[i], std::min(sizes[i], size), 0, {}});
  }

  size_t count() const { return samples_.size(); }
  int64_t address(size_t i) const { return reinterpret_cast<int64_t>(samples_[i].block); }

  void note() {
    turn_ = turn_ * 6364136223846793005u + 1442695040888963407u;  // Knuth's
    for (Sample& sample : samples_) {
      if (sample.kept == 0) continue;
      sample.at = static_cast<int64_t>((turn_ >> 16) % static_cast<uint64_t>(sample.bytes - sample.kept + 1));
      std::memcpy(sample.then.data(), sample.block + sample.at, static_cast<size_t>(sample.kept));
    }
  }

  bool changed() const {
    return std::any_of(samples_.begin(), samples_.end(), [](const Sample& sample) {
      return sample.kept != 0 &&
             std::memcmp(sample.then.data(), sample.block + sample.at, static_cast<size_t>(sample.kept)) != 0;
    });
  }

 private:
  struct Sample {
    const unsigned char* block;
    int64_t bytes, kept, at;
    std::array<unsigned char, size> then;
  };

  std::vector<Sample> samples_;
  uint64_t turn_ = 0;
};

}  // namespace pysteep
