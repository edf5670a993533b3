# SPDX-License-Identifier: Apache-2.0
# Builds the project in this folder as users would. Run by ctest with SATTN_SOURCE_DIR,
# SATTN_BINARY_DIR, SATTN_VERSION, GENERATOR and CXX_COMPILER.

set(work "${SATTN_BINARY_DIR}/consumer")
set(configure "${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -G "${GENERATOR}"
              "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}")
file(REMOVE_RECURSE "${work}")

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

function(build_and_check folder)
  run("${CMAKE_COMMAND}" --build "${folder}")
  execute_process(COMMAND "${folder}/consumer" OUTPUT_VARIABLE printed
                  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  if(NOT printed STREQUAL SATTN_VERSION)
    message(FATAL_ERROR "the consumer prints version ${printed}, expected ${SATTN_VERSION}")
  endif()
endfunction()

message(STATUS "consumer: add_subdirectory")
run(${configure} -B "${work}/subfolder" "-DSATTN_SOURCE_DIR=${SATTN_SOURCE_DIR}")
build_and_check("${work}/subfolder")

message(STATUS "consumer: install and find_package")
run("${CMAKE_COMMAND}" --install "${SATTN_BINARY_DIR}" --prefix "${work}/prefix")
# Moved, so a path of the first place inside the package would be noticed.
file(RENAME "${work}/prefix" "${work}/moved")
set(found ${configure} "-DCMAKE_PREFIX_PATH=${work}/moved")
run(${found} -B "${work}/installed" "-DWANTED_VERSION=${SATTN_VERSION}")
build_and_check("${work}/installed")

message(STATUS "consumer: an incompatible version is refused")
execute_process(COMMAND ${found} -B "${work}/refused" -DWANTED_VERSION=999.0
                RESULT_VARIABLE status OUTPUT_VARIABLE ignored ERROR_VARIABLE error)
if(status EQUAL 0)
  message(FATAL_ERROR "find_package(sattn 999.0) succeeded")
endif()
if(NOT error MATCHES "requested version")
  message(FATAL_ERROR "find_package(sattn 999.0) failed for another reason:\n${error}")
endif()
