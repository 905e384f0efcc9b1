// The CPU half of cuda.h: a block's threads run as fibres on one OS thread, and every barrier, warp collective and
// launch is a function call. Slow and exact; made for tests, sanitizers and debuggers. No CUDA header is included, so
// that no toolkit is needed.
//
//   TINYRES_SCHEDULE=forward | reverse | random:SEED    which thread goes first wherever CUDA leaves it open
//   -DTINYRES_UCONTEXT                                  portable fibre switches instead of x86-64 ones
//
// The parts, each of which includes those that it stands on:
#pragma once

#include "host/async_copy.h"  // cp.async
#include "host/atomics.h"
#include "host/cuda_names.h"   // keywords, vector types, mathematics
#include "host/fiber.h"        // a stack and how to change to another; what the sanitizers must be told
#include "host/launch.h"       // grids
#include "host/scheduler.h"    // blocks, barriers, failures
#include "host/shared.h"       // shared arrays and the arena
#include "host/tensor_core.h"  // ldmatrix, mma
#include "host/warp.h"         // shuffles, votes
