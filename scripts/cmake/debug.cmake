# Run by `cmake --install`, after it installed umbra: takes off the debug information, which is several times as large as
# the program. It goes into .debug beside the program, where gdb looks for it wherever both are moved to. Not for the
# package, for which CPack does that by itself (Install.cmake). `built` is the umbra of the build folder, which keeps its
# debug information; `folder` where it was installed below the prefix.
cmake_minimum_required(VERSION 3.25)

set(installed ${CMAKE_INSTALL_PREFIX}/${folder}/.debug)
set(debug $ENV{DESTDIR}${installed})
message(STATUS "Installing: ${debug}/umbra.debug")
file(MAKE_DIRECTORY ${debug})
execute_process(COMMAND ${objcopy} --only-keep-debug --compress-debug-sections ${built} umbra.debug
  WORKING_DIRECTORY ${debug} COMMAND_ERROR_IS_FATAL ANY)
file(CHMOD ${debug}/umbra.debug PERMISSIONS OWNER_READ OWNER_WRITE GROUP_READ WORLD_READ)
execute_process(COMMAND ${objcopy} --strip-all --add-gnu-debuglink=umbra.debug ../umbra
  WORKING_DIRECTORY ${debug} COMMAND_ERROR_IS_FATAL ANY)
list(APPEND CMAKE_INSTALL_MANIFEST_FILES ${installed}/umbra.debug)
