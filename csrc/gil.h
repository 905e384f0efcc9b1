// How a binding leaves the interpreter to run a kernel, and comes back.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <optional>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include "float_mode.h"

namespace tinyres {
namespace {

// While the interpreter ends, a thread that asks it for the GIL, as Python code does again and again, is ended by
// pthread_exit, which unwinds its stack: at the first destructor the process would abort. Held here, a daemon thread is
// as harmless as one still in its kernel.
template <class F>
void enter_interpreter(const F& work) {
#ifdef __GLIBCXX__
  try {
    work();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  work();
#endif
}

// For the life of the object other Python threads run, and this one computes in the standard floating-point mode.
class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) {}
  ~NoGil() {
    enter_interpreter([this] { PyEval_RestoreThread(state_); });
  }
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;

 private:
  PyThreadState* const state_;
  const StandardFloats floats_;
};

// The GIL for the life of the object, inside of a NoGil.
class Gil {
 public:
  Gil() {
    enter_interpreter([this] { held_.emplace(); });
  }

 private:
  std::optional<pybind11::gil_scoped_acquire> held_;
};

}  // namespace
}  // namespace tinyres
