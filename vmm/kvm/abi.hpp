// <linux/kvm.h> as a C++ program can use it. Only vmm/kvm/*.cpp include this.
#pragma once

#include <linux/stddef.h>

// The UAPI macro puts an empty struct before the array; C gives that struct size 0, C++ size 1, which changes
// the size of kvm_cpuid2 and kvm_msrs and with it their ioctl numbers.
#undef __DECLARE_FLEX_ARRAY
// NOLINTNEXTLINE(bugprone-reserved-identifier): it is the header's name for it
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[0]

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#include <linux/kvm.h>
#pragma GCC diagnostic pop

static_assert(sizeof(kvm_cpuid2) == 8 && sizeof(kvm_msrs) == 8);
