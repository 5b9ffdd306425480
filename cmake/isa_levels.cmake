# The one table of ISA levels. A level is a name, the compiler flags it adds, the CPUID features those flags may emit, and
# the register state that the operating system must save for it. Flags map one to one to features: no -march.
#
# Each csrc/cpu/<op>.isa.cpp names its levels in its first line:   // ISA: scalar avx2 avx512
# and is compiled once per level, in namespace pe::<level>.

set(PE_ISA_LEVELS scalar avx2 avx512 avx512_vnni avx512_bf16 amx)

set(PE_ISA_FLAGS_scalar "")
set(PE_ISA_CPUID_scalar "")
set(PE_ISA_OS_scalar "none")

set(PE_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(PE_ISA_CPUID_avx2 avx2 fma f16c)
set(PE_ISA_OS_avx2 ymm)

set(PE_ISA_FLAGS_avx512 ${PE_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(PE_ISA_CPUID_avx512 ${PE_ISA_CPUID_avx2} avx512f avx512bw avx512vl avx512dq)
set(PE_ISA_OS_avx512 zmm)

set(PE_ISA_FLAGS_avx512_vnni ${PE_ISA_FLAGS_avx512} -mavx512vnni)
set(PE_ISA_CPUID_avx512_vnni ${PE_ISA_CPUID_avx512} avx512vnni)
set(PE_ISA_OS_avx512_vnni zmm)

set(PE_ISA_FLAGS_avx512_bf16 ${PE_ISA_FLAGS_avx512_vnni} -mavx512bf16)
set(PE_ISA_CPUID_avx512_bf16 ${PE_ISA_CPUID_avx512_vnni} avx512bf16)
set(PE_ISA_OS_avx512_bf16 zmm)

set(PE_ISA_FLAGS_amx ${PE_ISA_FLAGS_avx512_bf16} -mamx-tile -mamx-int8 -mamx-bf16)
set(PE_ISA_CPUID_amx ${PE_ISA_CPUID_avx512_bf16} amx_tile amx_int8 amx_bf16)
set(PE_ISA_OS_amx tile)
if(PYENGINE_EMULATE_AMX)  # the same code; csrc/runtime/tile_emulator.cpp stands in for the tile unit
  list(FILTER PE_ISA_CPUID_amx EXCLUDE REGEX "^amx_")
  set(PE_ISA_OS_amx zmm)
endif()

# Writes pe/isa.h (the enum and the declaration macro) and pe/isa_table.inc (one row per level) into `folder`.
function(pe_write_isa_headers folder)
  set(declarations "")
  set(rows "")
  foreach(level IN LISTS PE_ISA_LEVELS)
    string(APPEND declarations "  namespace ${level} { extern const Type name; } \\\n")
    set(features "0")
    foreach(feature IN LISTS PE_ISA_CPUID_${level})
      string(APPEND features " | kCpu_${feature}")
    endforeach()
    string(APPEND rows "{\"${level}\", ${features}, OsState::${PE_ISA_OS_${level}}},\n")
  endforeach()
  string(JOIN ", " enumerators ${PE_ISA_LEVELS})
  file(CONFIGURE OUTPUT ${folder}/pe/isa.h @ONLY CONTENT [=[
// Generated from cmake/isa_levels.cmake. Levels are ordered: a higher one includes all lower ones.
#pragma once
namespace pe {
enum class Isa : int { @enumerators@ };
}
// Declares the function table `name` once in every ISA namespace; only those named in <op>.isa.cpp are defined.
#define PE_DECLARE_ISA_TABLE(Type, name) \
@declarations@  static_assert(true)
]=])
  file(CONFIGURE OUTPUT ${folder}/pe/isa_table.inc CONTENT "${rows}" @ONLY)
endfunction()

# Adds csrc/cpu/*.isa.cpp to `target`, one object library per level. Sets PE_OP_LEVELS_<op>.
function(pe_add_isa_sources target)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/*.isa.cpp)
  foreach(source IN LISTS sources)
    file(STRINGS ${source} first LIMIT_COUNT 1)
    if(NOT first MATCHES "^// ISA:((  *[a-z0-9_]+)+)$")
      message(FATAL_ERROR "${source}: the first line must read '// ISA: scalar avx2 ...', got '${first}'")
    endif()
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${source})
    string(STRIP "${CMAKE_MATCH_1}" levels)
    string(REPLACE " " ";" levels "${levels}")
    foreach(level IN LISTS levels)
      if(NOT level IN_LIST PE_ISA_LEVELS)
        message(FATAL_ERROR "${source}: unknown ISA level '${level}', expected one of ${PE_ISA_LEVELS}")
      endif()
      list(APPEND sources_${level} ${source})
    endforeach()
  endforeach()
  foreach(level IN LISTS PE_ISA_LEVELS)
    if(sources_${level})
      add_library(${target}_${level} OBJECT ${sources_${level}})
      target_compile_definitions(${target}_${level} PRIVATE PE_ISA=${level})
      target_compile_options(${target}_${level} PRIVATE
        ${PE_ISA_FLAGS_${level}} -fno-exceptions -fno-rtti -fno-threadsafe-statics
        # GCC 12 reports its own _mm512_undefined_* as uninitialised.
        -Wno-maybe-uninitialized -Wno-uninitialized)
      target_link_libraries(${target}_${level} PRIVATE pe_options)
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${level}>)
    endif()
  endforeach()
endfunction()
