/* What every op's C interface shares: many tensors a call, and numbers that may live on the device. */
#ifndef PYSTEEP_TENSORS_H
#define PYSTEEP_TENSORS_H

#include <stdint.h>

typedef enum pysteep_dtype {
  PYSTEEP_FLOAT16 = 0,
  PYSTEEP_BFLOAT16 = 1,
  PYSTEEP_FLOAT32 = 2,
  PYSTEEP_FLOAT64 = 3,
  PYSTEEP_INT16 = 4, /* what compensates rounding */
} pysteep_dtype;

/* A number: `value`, or what `address` points to when it is not NULL (float32 or float64, in the memory of the device that
   runs the op). It is read when the op runs, so a captured CUDA graph sees the value of the replay. */
typedef struct pysteep_scalar {
  double value;
  const void* address;
  pysteep_dtype dtype;
} pysteep_scalar;

#endif
