// A software model of the AMX tile unit, for tests on machines without one (CMake option PYENGINE_EMULATE_AMX). Never
// part of a release.
//
// The kernels are compiled as for silicon. Their instructions raise SIGILL here; the handler decodes each one, checks
// what the manual says about it, carries it out on the tiles of the thread, and goes on behind it. So a test covers the
// machine code that ships: encodings, register numbers, addresses, and the order that the compiler gave them.
//
// Model      Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, STTILECFG, TILERELEASE,
//            TILEZERO, TILELOADD, TILESTORED, TDPB[SU][SU]D, TDPBF16PS; palette 1
// Stricter   a tile configuration that was not released before the next one is an error too
// Errors     a message on stderr that names the instruction and what is wrong with it, then abort()
// Conflicts  whoever sets another handler of SIGILL later takes the model out: run pytest with `-p no:faulthandler`
#pragma once

namespace pe {

// May be called again. An instruction that is no tile instruction goes to the handler that was there before.
void install_tile_emulator();

}  // namespace pe
