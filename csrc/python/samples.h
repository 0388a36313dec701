// A few bytes of each of many blocks of memory, at another place each time: a write to most of a block shows in them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace pysteep {

class Samples {
 public:
  static constexpr int64_t size = 32;  // bytes of a block

  struct Block {
    int64_t address, bytes;

    bool operator==(const Block& other) const { return address == other.address && bytes == other.bytes; }
  };

  // Of the i-th block the first readable[i] bytes are looked at.
  Samples(std::vector<Block> blocks, const std::vector<int64_t>& readable) : blocks_(std::move(blocks)) {
    for (size_t i = 0; i < blocks_.size(); ++i)
      samples_.push_back(
          {reinterpret_cast<const unsigned char*>(blocks_[i].address), readable[i], std::min(readable[i], size), 0, {}});
  }

  // Only then may they be read.
  bool are_of(const std::vector<Block>& blocks) const { return blocks == blocks_; }

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

  std::vector<Block> blocks_;
  std::vector<Sample> samples_;
  uint64_t turn_ = 0;
};

}  // namespace pysteep
