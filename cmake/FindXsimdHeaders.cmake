# SPDX-License-Identifier: Apache-2.0
# Finds the headers of xsimd and defines Xsimd::headers.
#
# xsimd is header-only, but the package of Debian 12 exports a target that asks the linker for a
# library `xtl` that does not exist. This module needs the include folder alone.

find_path(XsimdHeaders_INCLUDE_DIR NAMES xsimd/xsimd.hpp)
mark_as_advanced(XsimdHeaders_INCLUDE_DIR)

if(XsimdHeaders_INCLUDE_DIR)
  file(READ "${XsimdHeaders_INCLUDE_DIR}/xsimd/config/xsimd_config.hpp" _xsimd_config)
  set(XsimdHeaders_VERSION "")
  foreach(_xsimd_part MAJOR MINOR PATCH)
    if(_xsimd_config MATCHES "#define +XSIMD_VERSION_${_xsimd_part} +([0-9]+)")
      list(APPEND XsimdHeaders_VERSION "${CMAKE_MATCH_1}")
    endif()
  endforeach()
  list(JOIN XsimdHeaders_VERSION "." XsimdHeaders_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  XsimdHeaders
  REQUIRED_VARS XsimdHeaders_INCLUDE_DIR
  VERSION_VAR XsimdHeaders_VERSION HANDLE_VERSION_RANGE)

if(XsimdHeaders_FOUND AND NOT TARGET Xsimd::headers)
  add_library(Xsimd::headers INTERFACE IMPORTED GLOBAL)
  # `-isystem /usr/include` would move that folder ahead of the compiler's own headers and break
  # `#include_next <stdlib.h>`. The compiler searches it anyway.
  if(NOT XsimdHeaders_INCLUDE_DIR IN_LIST CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES
     AND NOT XsimdHeaders_INCLUDE_DIR STREQUAL "/usr/include")
    set_target_properties(Xsimd::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                                                    "${XsimdHeaders_INCLUDE_DIR}")
  endif()
endif()
