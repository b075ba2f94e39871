# Guest kernels as CTest tests, run by `umbra test`. Comes with find_package(umbra).
#
#   umbra_add_guest_test(NAME name MANIFEST path [LABELS label...])
#
# Each case of the manifest `path`, or of all umbra.toml in the folder `path` and below, is a test "name/CASE", labelled
# with its tags. The cases are looked for whenever ctest starts, so that a changed manifest counts at once. If there are
# mistakes in one, a test "name" fails and tells them.
#
#   umbra_add_guest_test(NAME name KERNEL target-or-file
#                        [EXPECT outcome[:code]] [REQUIRED regex...] [FORBIDDEN regex...]
#                        [TIMEOUT seconds] [LABELS label...] [HOSTS trait...]
#                        [PROTOCOL name] [MEMORY size] [APPEND text] [INITRD file] [MODULES file[,args]...]
#                        [ENGINE engine] [CPU features] [TLB how] [SANITIZE what] [OPTIONS option...])
#
# One kernel, one test. The words mean what the keys of a case do, see umbra.toml(5); REQUIRED and FORBIDDEN are its
# console's. EXPECT is "passed", "failed:7", "triple-fault" and so on. Generator expressions are evaluated. Relative
# paths are from the current source folder.
#
# umbra ends a guest at its time limit itself and says so; ctest leaves it half a minute more. A test that this host
# cannot run is skipped. What failed guests leave is below umbra-results in the build folder: for people, and for
# `umbra report`. The umbra that is used is UMBRA_PROGRAM.
cmake_policy(VERSION 3.25)

function(umbra_add_guest_test)
  set(texts PROTOCOL MEMORY APPEND INITRD ENGINE CPU TLB SANITIZE)
  set(lists REQUIRED FORBIDDEN HOSTS MODULES OPTIONS)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "NAME;MANIFEST;KERNEL;EXPECT;TIMEOUT;${texts}" "LABELS;${lists}")
  if(arg_UNPARSED_ARGUMENTS OR arg_KEYWORDS_MISSING_VALUES)
    message(FATAL_ERROR
      "umbra_add_guest_test: not understood: ${arg_UNPARSED_ARGUMENTS} ${arg_KEYWORDS_MISSING_VALUES}")
  endif()
  if(NOT arg_NAME MATCHES "^[A-Za-z0-9_.+-]+$")
    message(FATAL_ERROR "umbra_add_guest_test: needs a NAME, of letters, digits and any of _.+-, not '${arg_NAME}'")
  endif()
  if(NOT UMBRA_PROGRAM)
    message(FATAL_ERROR "umbra_add_guest_test: UMBRA_PROGRAM is not set: call find_package(umbra) here or further up")
  endif()
  set(results ${CMAKE_BINARY_DIR}/umbra-results/${arg_NAME})

  if(DEFINED arg_MANIFEST AND NOT DEFINED arg_KERNEL)
    cmake_path(ABSOLUTE_PATH arg_MANIFEST)
    set(module ${CMAKE_CURRENT_FUNCTION_LIST_FILE})
    set(script ${CMAKE_CURRENT_BINARY_DIR}/umbra-tests/${arg_NAME}.cmake)
    file(CONFIGURE OUTPUT ${script} @ONLY CONTENT [[
include([==[@module@]==])
umbra_discover_guest_tests([==[@arg_NAME@]==] [==[@arg_MANIFEST@]==] [==[@UMBRA_PROGRAM@]==] [==[@results@]==]
  [==[@arg_LABELS@]==])
]])
    set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES ${script})
    return()
  endif()

  if(DEFINED arg_MANIFEST OR NOT DEFINED arg_KERNEL)
    message(FATAL_ERROR "umbra_add_guest_test: needs either MANIFEST or KERNEL")
  endif()
  if(NOT DEFINED arg_TIMEOUT)
    set(arg_TIMEOUT 60)
  elseif(NOT arg_TIMEOUT MATCHES "^[1-9][0-9]*$")
    message(FATAL_ERROR "umbra_add_guest_test: TIMEOUT is a number of seconds, not '${arg_TIMEOUT}'")
  endif()
  if(TARGET ${arg_KERNEL})
    set(arg_KERNEL $<TARGET_FILE:${arg_KERNEL}>)
  endif()
  foreach(path IN ITEMS KERNEL INITRD) # from the manifest's folder, which is another one
    if(DEFINED arg_${path} AND NOT arg_${path} MATCHES "^\\$<")
      cmake_path(ABSOLUTE_PATH arg_${path})
    endif()
  endforeach()
  list(TRANSFORM arg_MODULES REPLACE "^([^/$])" "${CMAKE_CURRENT_SOURCE_DIR}/\\1")

  set(toml "[[case]]\nname = \"${arg_NAME}\"\ntimeout = ${arg_TIMEOUT}\n")
  foreach(key IN ITEMS KERNEL LISTS texts)
    if(DEFINED arg_${key})
      umbra_toml_string(text "${arg_${key}}")
      string(TOLOWER ${key} name)
      string(APPEND toml "${name} = ${text}\n")
    endif()
  endforeach()
  if(arg_EXPECT MATCHES "^(.*):([0-9]+)$")
    string(APPEND toml "expect = { outcome = \"${CMAKE_MATCH_1}\", code = ${CMAKE_MATCH_2} }\n")
  elseif(DEFINED arg_EXPECT)
    string(APPEND toml "expect = \"${arg_EXPECT}\"\n")
  endif()
  foreach(key IN LISTS lists)
    string(TOLOWER ${key} name)
    if(key MATCHES "^(REQUIRED|FORBIDDEN)$")
      set(name console.${name})
    endif()
    string(APPEND toml "${name} = [")
    foreach(item IN LISTS arg_${key})
      umbra_toml_string(text "${item}")
      string(APPEND toml "${text}, ")
    endforeach()
    string(APPEND toml "]\n")
  endforeach()
  file(GENERATE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/umbra-tests/$<CONFIG>/${arg_NAME}/umbra.toml CONTENT "${toml}")
  add_test(NAME ${arg_NAME}
    COMMAND ${UMBRA_PROGRAM} test --output=${results} umbra.toml
    WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/umbra-tests/$<CONFIG>/${arg_NAME})
  umbra_describe_guest_test(${arg_NAME} ${arg_TIMEOUT} "${arg_LABELS}")
endfunction()

# What ctest has to know of a test beside its command. `seconds`: the guest's time limit.
function(umbra_describe_guest_test test seconds labels)
  math(EXPR timeout "${seconds} + 30") # umbra itself takes up to 18 to end what does not end
  set_tests_properties("${test}" PROPERTIES LABELS "${labels}" TIMEOUT ${timeout}
    SKIP_RETURN_CODE 4) # nothing failed, but this host cannot run it
endfunction()

# Sets `result` to `text` as TOML has it.
function(umbra_toml_string result text)
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  string(REPLACE "\n" "\\n" text "${text}")
  string(REPLACE "\t" "\\t" text "${text}")
  set(${result} "\"${text}\"" PARENT_SCOPE)
endfunction()

# What ctest calls: adds the tests of the manifest, or folder of manifests, `path`.
function(umbra_discover_guest_tests prefix path umbra results labels)
  if(IS_DIRECTORY "${path}")
    set(folder "${path}")
  else()
    cmake_path(GET path PARENT_PATH folder)
  endif()
  execute_process(COMMAND "${umbra}" test --list=json "${path}" WORKING_DIRECTORY "${folder}"
    OUTPUT_VARIABLE cases ERROR_QUIET RESULT_VARIABLE exit_code)
  if(NOT exit_code EQUAL 0)
    add_test("${prefix}" "${umbra}" test --list "${path}") # fails as that did, and is seen
    return()
  endif()
  # By index: a list would break where there are brackets and semicolons in a name.
  string(JSON count LENGTH "${cases}")
  set(index 0)
  while(index LESS count)
    string(JSON case GET "${cases}" ${index} name)
    string(JSON manifest GET "${cases}" ${index} manifest)
    string(JSON seconds GET "${cases}" ${index} timeout_seconds)
    string(JSON tag_count LENGTH "${cases}" ${index} tags)
    set(all_labels "${labels}")
    set(tag 0)
    while(tag LESS tag_count)
      string(JSON label GET "${cases}" ${index} tags ${tag})
      list(APPEND all_labels "${label}")
      math(EXPR tag "${tag} + 1")
    endwhile()
    string(REGEX MATCH "^[0-9]+" seconds "${seconds}")
    # A pattern that the name is like, and a folder that is the case's own.
    string(REGEX REPLACE "^-" "?" pattern "${case}")
    string(REGEX REPLACE "[^A-Za-z0-9_.+=,-]+" "_" own_folder "${case}")
    set(test "${prefix}/${case}")
    add_test("${test}" "${umbra}" test "--output=${results}/${index}-${own_folder}" "--filter=${pattern}" "${manifest}")
    set_tests_properties("${test}" PROPERTIES WORKING_DIRECTORY "${folder}")
    umbra_describe_guest_test("${test}" ${seconds} "${all_labels}")
    math(EXPR index "${index} + 1")
  endwhile()
endfunction()
