// Which ISA level this process may use, and why.
#pragma once
#include <string>
#include <vector>

#include "pe/isa.h"

namespace pe {

const char* isa_name(Isa isa);

// Levels that this CPU and this operating system support, lowest first. Detected once.
const std::vector<Isa>& available_isas();

// The level in use: the best available one, lowered by PYENGINE_ISA or set_active_isa.
// Throws ArgumentError if PYENGINE_ISA names an unknown level or one that this machine lacks.
Isa active_isa();

// Lowers (or restores) the level; returns the previous one. Throws ArgumentError like active_isa.
Isa set_active_isa(const std::string& name);

// One line for `pyengine doctor`: what the next higher level lacks here, or "" if there is none.
std::string isa_limit_reason();

// "" in every build but one with PYENGINE_EMULATE_AMX: then what is emulated, and that the build is for tests.
const char* isa_emulation();

std::string cpu_name();

}  // namespace pe
