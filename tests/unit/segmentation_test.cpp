// Unit tests of vmm/segmentation: every check of every kind of segment load, with its error code.
#include "vmm/segmentation.hpp"

#include "tests/unit/test_guest.hpp"

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace test;

class SegmentationTest : public ::testing::Test {
  protected:
    Fault load(SegmentRegister reg, std::uint16_t selector) {
        return fault_of(load_segment(guest.cpu, guest.space(), reg, selector));
    }
    Fault check_return(std::uint16_t selector) {
        return fault_of(check_return_code_segment(guest.cpu, guest.space(), selector, loaded));
    }
    Fault check_return_stack(std::uint16_t selector, std::uint8_t cpl, bool to_64_bit = true) {
        return fault_of(
            check_return_stack_segment(guest.cpu, guest.space(), selector, cpl, to_64_bit, loaded));
    }
    Fault check_jump(std::uint16_t selector) {
        return fault_of(check_jump_code_segment(guest.cpu, guest.space(), selector, loaded));
    }
    Fault lldt(std::uint16_t selector) { return fault_of(load_ldtr(guest.cpu, guest.space(), selector)); }
    Fault ltr(std::uint16_t selector) { return fault_of(load_tr(guest.cpu, guest.space(), selector)); }

    TestGuest guest;
    VirtualCpu& cpu = guest.cpu;
    Segment loaded;
};

TEST_F(SegmentationTest, DescriptorFields) {
    guest.descriptor(TestGuest::gdt, 0x10, 0xf3, 0xd, 0x1234'5678, 0xa'bcde);
    ASSERT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x13, loaded)), no_fault);
    EXPECT_EQ(loaded.selector, 0x13);
    EXPECT_EQ(loaded.base, 0x1234'5678U);
    EXPECT_EQ(loaded.limit, 0xabcd'efffU);
    EXPECT_EQ(loaded.type, 3);
    EXPECT_EQ(loaded.dpl, 3);
    EXPECT_TRUE(loaded.present && loaded.granularity && loaded.default_32 && loaded.available);
    EXPECT_FALSE(loaded.system || loaded.long_mode);

    guest.descriptor(TestGuest::gdt, 0x10, 0x02, 0x2, 0, 0xa'bcde);
    ASSERT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x10, loaded)), no_fault);
    EXPECT_EQ(loaded.limit, 0xa'bcdeU);
    EXPECT_TRUE(loaded.system && loaded.long_mode);
    EXPECT_FALSE(loaded.present || loaded.granularity || loaded.default_32 || loaded.available);
}

TEST_F(SegmentationTest, DescriptorOutsideItsTable) {
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0, loaded)), gp(0));
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 3, loaded, 1)), gp(1));
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x203, loaded)), gp(0x200));
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x203, loaded, 1)), gp(0x201));
    cpu.gdtr.limit = 0x16; // the last byte of the descriptor is missing
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x10, loaded)), gp(0x10));
    cpu.gdtr.limit = 0x17;
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x10, loaded)), no_fault);
}

TEST_F(SegmentationTest, DescriptorInTheLocalTable) {
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), sel::local_data, loaded)), gp(sel::local_data));
    ASSERT_EQ(lldt(sel::ldt), no_fault);
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), sel::local_data, loaded)), no_fault);
    EXPECT_EQ(fault_of(read_descriptor(cpu, guest.space(), 0x14, loaded)), gp(0x14));
}

TEST_F(SegmentationTest, DescriptorReadsAreSupervisorAccessesThatCanFault) {
    guest.enter_user();
    EXPECT_EQ(load(SegmentRegister::ds, sel::user_data), no_fault); // the GDT is on a kernel page
    guest.map(TestGuest::gdt, 0);
    EXPECT_EQ(load(SegmentRegister::ds, sel::user_data), pf(0));
    cpu.gdtr.base = GuestVirt(TestGuest::non_canonical);
    EXPECT_EQ(load(SegmentRegister::ds, sel::user_data), gp(sel::user_data & ~3));
}

TEST_F(SegmentationTest, DataSegmentsAreLoadedAndMarkedAccessed) {
    for (const auto reg :
         {SegmentRegister::es, SegmentRegister::ds, SegmentRegister::fs, SegmentRegister::gs}) {
        guest.descriptor(TestGuest::gdt, 0x10, 0x92, 0xc, 0x1000);
        ASSERT_EQ(load(reg, 0x10), no_fault);
        EXPECT_EQ(segment(cpu, reg).selector, 0x10);
        EXPECT_EQ(segment(cpu, reg).base, 0x1000U);
        EXPECT_EQ(segment(cpu, reg).type, 3);
        EXPECT_TRUE(segment(cpu, reg).present);
        EXPECT_EQ(guest.access_of(0x10), 0x93);
    }
}

TEST_F(SegmentationTest, MarkingAccessedNeedsAWritableTableOnlyOnce) {
    guest.map(TestGuest::gdt, entry_bit::present);
    EXPECT_EQ(load(SegmentRegister::ds, sel::kernel_data), pf(PageFault::present | PageFault::write));
    EXPECT_EQ(cpu.ds.selector, 0);
    guest.descriptor(TestGuest::gdt, sel::kernel_data, 0x93, TestGuest::flags_32);
    EXPECT_EQ(load(SegmentRegister::ds, sel::kernel_data), no_fault);
}

TEST_F(SegmentationTest, NullDataSegmentsAreAllowedAndEmpty) {
    cpu.fs.base = 0x1234;
    for (const std::uint16_t selector : std::array<std::uint16_t, 2>{0, 3}) {
        ASSERT_EQ(load(SegmentRegister::fs, selector), no_fault);
        EXPECT_FALSE(cpu.fs.present);
        EXPECT_EQ(cpu.fs.selector, selector);
        EXPECT_EQ(cpu.fs.base, 0U);
    }
}

TEST_F(SegmentationTest, DataSegmentChecks) {
    constexpr auto ds = SegmentRegister::ds;
    EXPECT_EQ(load(ds, sel::beyond), gp(sel::beyond));
    EXPECT_EQ(load(ds, sel::tss), gp(sel::tss));
    EXPECT_EQ(load(ds, sel::execute_only_code), gp(sel::execute_only_code));
    EXPECT_EQ(load(ds, sel::absent_data), np(sel::absent_data));
    EXPECT_EQ(load(ds, sel::kernel_data | 3), gp(sel::kernel_data)); // RPL > DPL
    EXPECT_EQ(load(ds, sel::read_only_data), no_fault);
    EXPECT_EQ(load(ds, sel::kernel_code), no_fault); // readable code
    EXPECT_EQ(load(ds, sel::conforming_code | 3), no_fault);
    guest.enter_user();
    EXPECT_EQ(load(ds, sel::kernel_data), gp(sel::kernel_data)); // CPL > DPL
    EXPECT_EQ(load(ds, sel::conforming_code), no_fault);
    EXPECT_EQ(load(ds, sel::user_data & ~3), no_fault);
}

TEST_F(SegmentationTest, StackSegmentChecks) {
    constexpr auto reg = SegmentRegister::ss;
    EXPECT_EQ(load(reg, sel::kernel_data), no_fault);
    EXPECT_EQ(load(reg, 0), no_fault);
    EXPECT_FALSE(cpu.ss.present);
    EXPECT_EQ(load(reg, 3), gp(0)); // RPL is not CPL
    EXPECT_EQ(load(reg, sel::kernel_data | 3), gp(sel::kernel_data));
    EXPECT_EQ(load(reg, sel::user_data), gp(sel::user_data & ~3));
    EXPECT_EQ(load(reg, sel::user_data & ~3), gp(sel::user_data & ~3)); // DPL is not CPL
    EXPECT_EQ(load(reg, sel::read_only_data), gp(sel::read_only_data));
    EXPECT_EQ(load(reg, sel::kernel_code), gp(sel::kernel_code));
    EXPECT_EQ(load(reg, sel::absent_data), ss(sel::absent_data));
    EXPECT_EQ(load(reg, sel::beyond), gp(sel::beyond));
    guest.enter_user();
    EXPECT_EQ(load(reg, 3), gp(0)); // never null at level 3
    EXPECT_EQ(load(reg, sel::user_data), no_fault);
}

TEST_F(SegmentationTest, ReturnCodeSegmentChecks) {
    EXPECT_EQ(check_return(0), gp(0));
    EXPECT_EQ(check_return(3), gp(0));
    EXPECT_EQ(check_return(sel::beyond), gp(sel::beyond));
    EXPECT_EQ(check_return(sel::kernel_data), gp(sel::kernel_data));
    EXPECT_EQ(check_return(sel::tss), gp(sel::tss));
    EXPECT_EQ(check_return(sel::absent_code), np(sel::absent_code));
    EXPECT_EQ(check_return(sel::long_and_default_code), gp(sel::long_and_default_code));
    EXPECT_EQ(check_return(sel::kernel_code | 3), gp(sel::kernel_code)); // DPL is not RPL
    EXPECT_EQ(check_return(sel::user_code & ~3), gp(sel::user_code & ~3));
    EXPECT_EQ(check_return(sel::user_conforming_code & ~3), gp(sel::user_conforming_code & ~3));
    EXPECT_EQ(check_return(sel::conforming_code | 3), no_fault); // DPL <= RPL
    EXPECT_EQ(check_return(sel::kernel_code), no_fault);
    EXPECT_EQ(check_return(sel::user_code), no_fault);
    EXPECT_TRUE(loaded.long_mode);
    EXPECT_EQ(check_return(sel::user_code_32), no_fault);
    EXPECT_TRUE(loaded.default_32);
    guest.enter_user();
    EXPECT_EQ(check_return(sel::kernel_code), gp(sel::kernel_code)); // RPL < CPL
}

TEST_F(SegmentationTest, ReturnStackSegmentChecks) {
    EXPECT_EQ(check_return_stack(0, 0), no_fault);
    EXPECT_EQ(check_return_stack(0, 0, false), gp(0)); // null is for 64-bit code only
    EXPECT_EQ(check_return_stack(3, 3), gp(0));
    EXPECT_EQ(check_return_stack(1, 0), gp(0));
    EXPECT_EQ(check_return_stack(sel::user_data, 3), no_fault);
    EXPECT_EQ(check_return_stack(sel::kernel_data, 3), gp(sel::kernel_data));
    EXPECT_EQ(check_return_stack(sel::kernel_data | 3, 3), gp(sel::kernel_data));
    EXPECT_EQ(check_return_stack(sel::user_code, 3), gp(sel::user_code & ~3));
    EXPECT_EQ(check_return_stack(sel::absent_user_data, 3), ss(sel::absent_user_data & ~3));
    EXPECT_EQ(check_return_stack(sel::beyond | 3, 3), gp(sel::beyond));
}

TEST_F(SegmentationTest, JumpCodeSegmentChecks) {
    EXPECT_EQ(check_jump(0), gp(0));
    EXPECT_EQ(check_jump(sel::beyond), gp(sel::beyond));
    EXPECT_EQ(check_jump(sel::kernel_data), gp(sel::kernel_data));
    EXPECT_EQ(check_jump(sel::tss), gp(sel::tss));
    EXPECT_EQ(check_jump(sel::absent_code), np(sel::absent_code));
    EXPECT_EQ(check_jump(sel::long_and_default_code), gp(sel::long_and_default_code));
    EXPECT_EQ(check_jump(sel::user_code), gp(sel::user_code & ~3));                       // DPL is not CPL
    EXPECT_EQ(check_jump(sel::kernel_code | 3), gp(sel::kernel_code));                    // RPL > CPL
    EXPECT_EQ(check_jump(sel::user_conforming_code), gp(sel::user_conforming_code & ~3)); // DPL > CPL
    EXPECT_EQ(check_jump(sel::conforming_code | 3), no_fault);
    EXPECT_EQ(check_jump(sel::kernel_code), no_fault);
    EXPECT_FALSE(loaded.system);
    EXPECT_EQ(check_jump(sel::call_gate), no_fault);
    EXPECT_TRUE(loaded.system);
}

TEST_F(SegmentationTest, OuterReturnDropsInnerDataSegments) {
    guest.enter_user();
    cpu.ds = TestGuest::segment(sel::kernel_data, 3, 0, false);
    cpu.es = TestGuest::segment(sel::user_data, 3, 3, false);
    cpu.fs = TestGuest::segment(sel::conforming_code, 0xf, 0, true);
    cpu.gs = TestGuest::segment(sel::kernel_data, 3, 0, false);
    cpu.gs.base = 0x5000;
    drop_inner_data_segments(cpu);
    EXPECT_FALSE(cpu.ds.present);
    EXPECT_EQ(cpu.ds.selector, 0);
    EXPECT_EQ(cpu.es.selector, sel::user_data);
    EXPECT_EQ(cpu.fs.selector, sel::conforming_code);
    EXPECT_FALSE(cpu.gs.present);
    EXPECT_EQ(cpu.gs.base, 0x5000U); // as MSR_GS_BASE set it
    cpu.ds = Segment{.selector = 3}; // null, but not 0: becomes 0
    drop_inner_data_segments(cpu);
    EXPECT_EQ(cpu.ds.selector, 0);
}

TEST_F(SegmentationTest, LocalTable) {
    guest.system_descriptor(sel::ldt, 0x82, 0xffff'8000'1234'5678, 0x2f);
    ASSERT_EQ(lldt(sel::ldt), no_fault);
    EXPECT_EQ(cpu.ldtr.base, 0xffff'8000'1234'5678U);
    EXPECT_EQ(cpu.ldtr.limit, 0x2fU);
    EXPECT_TRUE(cpu.ldtr.present && cpu.ldtr.system);
    EXPECT_EQ(lldt(0), no_fault);
    EXPECT_FALSE(cpu.ldtr.present);
}

TEST_F(SegmentationTest, LocalTableChecks) {
    EXPECT_EQ(lldt(sel::local_data), gp(sel::local_data));
    EXPECT_EQ(lldt(sel::beyond), gp(sel::beyond));
    EXPECT_EQ(lldt(sel::kernel_data), gp(sel::kernel_data));
    EXPECT_EQ(lldt(sel::tss), gp(sel::tss));
    guest.system_descriptor(sel::ldt, 0x02, TestGuest::ldt, 0xf);
    EXPECT_EQ(lldt(sel::ldt), np(sel::ldt));
    guest.system_descriptor(sel::ldt, 0x82, TestGuest::non_canonical, 0xf);
    EXPECT_EQ(lldt(sel::ldt), gp(sel::ldt));
    guest.system_descriptor(sel::ldt, 0x82, TestGuest::ldt, 0xf);
    guest.put<std::uint64_t>(TestGuest::gdt + sel::ldt + 8, std::uint64_t{1} << 40); // upper type is not 0
    EXPECT_EQ(lldt(sel::ldt), gp(sel::ldt));
    guest.system_descriptor(sel::ldt, 0x82, TestGuest::ldt, 0xf);
    cpu.gdtr.limit = sel::ldt + 14; // all 16 bytes must be inside
    EXPECT_EQ(lldt(sel::ldt), gp(sel::ldt));
    cpu.gdtr.limit = sel::ldt + 15;
    EXPECT_EQ(lldt(sel::ldt), no_fault);
}

TEST_F(SegmentationTest, TaskRegister) {
    cpu.tr = Segment{};
    ASSERT_EQ(ltr(sel::tss), no_fault);
    EXPECT_EQ(cpu.tr.base, TestGuest::tss);
    EXPECT_EQ(cpu.tr.limit, TestGuest::tss_limit);
    EXPECT_EQ(cpu.tr.type, descriptor_type::tss_busy);
    EXPECT_TRUE(cpu.tr.present);
    EXPECT_EQ(guest.access_of(sel::tss), 0x8b);
    EXPECT_EQ(ltr(sel::tss), gp(sel::tss)); // busy now
}

TEST_F(SegmentationTest, TaskRegisterChecks) {
    EXPECT_EQ(ltr(0), gp(0));
    EXPECT_EQ(ltr(sel::local_data), gp(sel::local_data));
    EXPECT_EQ(ltr(sel::ldt), gp(sel::ldt));
    EXPECT_EQ(ltr(sel::kernel_code), gp(sel::kernel_code));
    EXPECT_EQ(ltr(sel::beyond), gp(sel::beyond));
    guest.system_descriptor(sel::tss, 0x09, TestGuest::tss, 0x67);
    EXPECT_EQ(ltr(sel::tss), np(sel::tss));
    guest.system_descriptor(sel::tss, 0x89, TestGuest::non_canonical, 0x67);
    EXPECT_EQ(ltr(sel::tss), gp(sel::tss));
    guest.system_descriptor(sel::tss, 0x89, TestGuest::tss, 0x67);
    guest.map(TestGuest::gdt, entry_bit::present);
    EXPECT_EQ(ltr(sel::tss), pf(PageFault::present | PageFault::write)); // cannot be marked busy
}

} // namespace
} // namespace umbra
