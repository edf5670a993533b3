# SPDX-License-Identifier: Apache-2.0

# Compiler warnings for this project's own programs.
function(sattn_set_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wconversion
                                           -Wshadow)
  if(NOT SATTN_WERROR)
    return()
  endif()
  target_compile_options(${target} PRIVATE -Werror)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12 reports its own avx512fintrin.h.
    target_compile_options(${target} PRIVATE -Wno-error=maybe-uninitialized -Wno-error=uninitialized)
    if(CMAKE_CXX_FLAGS MATCHES "-fsanitize")
      # GCC documents false alarms of its flow analysis in instrumented code.
      target_compile_options(${target} PRIVATE -Wno-error=array-bounds -Wno-error=restrict
                                               -Wno-error=stringop-overflow)
    endif()
  endif()
endfunction()
