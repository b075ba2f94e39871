# What `cmake --install` puts where, and the Debian package that `cpack -G DEB` makes of it. Included by the top
# CMakeLists.txt, after all targets. What is installed can be moved: nothing in it knows where it is.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME program)
install(TARGETS umbra RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})

install(CODE "
set(built [==[$<TARGET_FILE:umbra>]==])
set(folder [==[${CMAKE_INSTALL_BINDIR}]==])
set(objcopy [==[${CMAKE_OBJCOPY}]==])" COMPONENT debug)
install(SCRIPT ${CMAKE_CURRENT_LIST_DIR}/debug.cmake COMPONENT debug)

foreach(section IN ITEMS 1 5)
  install(DIRECTORY ${CMAKE_SOURCE_DIR}/launcher/man/ DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section}
    FILES_MATCHING PATTERN *.${section})
endforeach()
install(FILES ${CMAKE_SOURCE_DIR}/launcher/completion/umbra.bash
  DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME umbra)

# For find_package(umbra). Not below lib: it is the same for all architectures.
set(package_folder ${CMAKE_INSTALL_DATADIR}/cmake/umbra)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/umbraConfig.cmake.in ${CMAKE_BINARY_DIR}/umbraConfig.cmake
  INSTALL_DESTINATION ${package_folder} PATH_VARS CMAKE_INSTALL_BINDIR)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/umbraConfigVersion.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES
  ${CMAKE_CURRENT_LIST_DIR}/UmbraGuestTest.cmake
  ${CMAKE_BINARY_DIR}/umbraConfig.cmake
  ${CMAKE_BINARY_DIR}/umbraConfigVersion.cmake
  DESTINATION ${package_folder})

# gdb's commands for those who do not start it by `umbra debug`, which has them within.
install(FILES ${CMAKE_SOURCE_DIR}/scripts/gdb/umbra.py DESTINATION ${CMAKE_INSTALL_DATADIR}/umbra/gdb)
install(FILES ${CMAKE_SOURCE_DIR}/README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} RENAME copyright)
install(DIRECTORY ${CMAKE_SOURCE_DIR}/scripts/ci/ DESTINATION ${CMAKE_INSTALL_DOCDIR}/examples/ci
  FILES_MATCHING PATTERN *.yml PATTERN *.yaml)

# --- The package

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME umbra)
set(CPACK_PACKAGE_CONTACT "umbra developers <umbra@packages.invalid>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "runs x86-64 kernels on software shadow page tables")
set(CPACK_PACKAGE_DESCRIPTION "umbra is a lightweight hypervisor: one process over KVM. It launches guest
kernels, from one of a few lines to Linux, deprivileged and on page tables
that it keeps for them in software; serves gdb and LLDB; runs folders of
kernels as regression tests, with reports for CI servers; and finds TLB
flushes that a kernel forgot.")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
# The debug information becomes the package umbra-dbgsym, by Debian's name for it, in a file .ddeb.
set(CPACK_INSTALL_CMAKE_PROJECTS "${CMAKE_BINARY_DIR};${PROJECT_NAME};program;/")
set(CPACK_DEBIAN_DEBUGINFO_PACKAGE ON)
# Folders have these rights whatever the umask of who makes the package.
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS
  OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
set(CPACK_PRE_BUILD_SCRIPTS ${CMAKE_CURRENT_LIST_DIR}/debian.cmake)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION devel)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
# For `umbra debug`, and for the emulated host on machines without KVM.
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS
  "gdb, qemu-system-x86, qemu-system-common, linux-image-cloud-amd64 | linux-image-amd64")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "bash-completion, cmake")
include(CPack)
