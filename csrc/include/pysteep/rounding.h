/* How weights and factors of 16 bits are rounded when an op stores them. Wider ones are stored as they were computed.

     nearest        to the nearest, ties to even
     stochastic     up or down, with the chances that leave the expected value as it is
     compensated    to the nearest; the 16 bits that follow those of the number are kept beside it and taken up again

   Let |x| be an integer in units of 2^-16 of the last place of the 16-bit format. Rounding adds noise to it and drops its 16
   lowest bits: stochastic rounding a random number in [0, 2^16), compensated rounding 2^15, where the dropped bits, less 2^16
   if they carried, are the compensation. Of float32 no bit is lost so, but below 2^-17 where the format is float16.

   Element e of a whole parameter has the 16 bits (e & 7) of the block Philox4x32-7 of counter (e >> 4, (e >> 36) | role << 16,
   step, stream) under the key `seed`, bits 0 to 15 of word 0 first; inverted if e & 8. So they depend on nothing but these
   numbers, and of two neighbouring eights one tends up where the other tends down: each is unbiased, their sum varies less. */
#ifndef PYSTEEP_ROUNDING_H
#define PYSTEEP_ROUNDING_H

#include "pysteep/tensors.h"

typedef enum pysteep_rounding_mode {
  PYSTEEP_NEAREST = 0,
  PYSTEEP_STOCHASTIC = 1,
  PYSTEEP_COMPENSATED = 2,
} pysteep_rounding_mode;

/* The arrays hold an entry for each tensor of the call. `step` is a whole number. `stream`, `first`: stochastic, else NULL;
   first[i] is the element of its parameter at which tensor i begins. `compensation`: compensated, else NULL; that of tensor i
   of role r is compensation[r * count + i], an int16 for each element. The role of weights is 0, that of factor k is k - 1. */
typedef struct pysteep_rounding {
  pysteep_rounding_mode mode;
  uint64_t seed;
  pysteep_scalar step;
  const uint32_t* stream;
  const int64_t* first;
  void* const* compensation;
} pysteep_rounding;

#endif
