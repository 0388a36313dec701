// Written by tools/power_coefficients.py. Lowest power first.
#pragma once

namespace pysteep {

template <typename T>
struct Log2Coefficients;
template <typename T>
struct Exp2Coefficients;

template <>
struct Log2Coefficients<float> {
  static constexpr int count = 8;
  static constexpr float value[] = {0x1.7154760000000p+0f, -0x1.71552c0000000p-1f, 0x1.ec756e0000000p-2f, -0x1.70dede0000000p-2f, 0x1.262f0e0000000p-2f, -0x1.fe823a0000000p-3f, 0x1.dc78f40000000p-3f, -0x1.245f380000000p-3f};
};
template <>
struct Exp2Coefficients<float> {
  static constexpr int count = 6;
  static constexpr float value[] = {0x1.62e4300000000p-1f, 0x1.ebfbe00000000p-3f, 0x1.c6af6c0000000p-5f, 0x1.3b2a540000000p-7f, 0x1.5f08900000000p-10f, 0x1.44138a0000000p-13f};
};
template <>
struct Log2Coefficients<double> {
  static constexpr int count = 23;
  static constexpr double value[] = {0x1.71547652b82fep+0, -0x1.71547652b82fep-1, 0x1.ec709dc3a0406p-2, -0x1.71547652b83b9p-2, 0x1.2776c50ef9124p-2, -0x1.ec709dc38b423p-3, 0x1.a61762a856935p-3, -0x1.7154765b89cdcp-3, 0x1.484b13b15a28ap-3, -0x1.2776c3013799bp-3, 0x1.0c9a88ccc71dep-3, -0x1.ec7130b5f4d03p-4, 0x1.c68f1269f7b39p-4, -0x1.a60ab65359c9fp-4, 0x1.89eab07181f83p-4, -0x1.71fe1f7281d5ep-4, 0x1.5cbb11997160dp-4, -0x1.4367a3c04d43fp-4, 0x1.293f93dc7e025p-4, -0x1.346b2d1c3320bp-4, 0x1.666007c520439p-4, -0x1.3c278f266c412p-4, 0x1.030d84e7bb3acp-5};
};
template <>
struct Exp2Coefficients<double> {
  static constexpr int count = 12;
  static constexpr double value[] = {0x1.62e42fefa39efp-1, 0x1.ebfbdff82c58fp-3, 0x1.c6b08d704a0c6p-5, 0x1.3b2ab6fba4e79p-7, 0x1.5d87fe78a3f9cp-10, 0x1.430912f86b7dbp-13, 0x1.ffcbfc6da6ed1p-17, 0x1.62c02242b879cp-20, 0x1.b524ebd13a55fp-24, 0x1.e4cf10dec0f59p-28, 0x1.e9ec1fcb69a7fp-32, 0x1.c4a29324a1038p-36};
};

}  // namespace pysteep
