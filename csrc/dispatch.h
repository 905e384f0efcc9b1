// The instruction sets that this build carries kernels for, and the one in use: the widest that the machine has,
// unless TINYRES_CPU_ISA names another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tinyres {

// Decides, once. Throws std::runtime_error if TINYRES_CPU_ISA names a set that cannot be used here.
void choose_isa();

const std::string& isa();
std::vector<std::string> isas();  // those that this machine can run, narrowest first

}  // namespace tinyres
