// The thread pool behind one function. Chunks are fixed by the caller from the shape alone, and any thread may run any
// of them, so results never depend on the number of threads.
#pragma once

#include "kernels.h"

namespace tinyres {

// Runs fn(context, chunk) for chunk = 0 .. chunks-1 on up to threads() threads, the caller among them, and returns
// when all are done. An exception thrown by fn is rethrown here. Nested calls, and calls made while another
// Python thread holds the pool, run inline on the caller.
void parallel_run(i64 chunks, void (*fn)(void* context, i64 chunk), void* context);

int threads();                // threads used by calls from this thread
void set_threads(int count);  // for calls from this thread; 0 returns to the default

// The default: OMP_NUM_THREADS where set, else the CPUs that this process may run on.
int default_threads();

}  // namespace tinyres
