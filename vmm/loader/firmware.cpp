// Finds places for what firmware leaves, around the kernel.
#include "vmm/loader/firmware.hpp"

#include "vmm/loader/acpi_tables.hpp"
#include "vmm/loader/bios_data.hpp"
#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/mp_table.hpp"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string_view>

namespace umbra {

namespace {

constexpr GuestPhys adapter_memory{0xc0000}; // of adapters' ROMs on a PC; free here
constexpr GuestPhys scanned_by_acpi{0xe0000};
constexpr GuestPhys usual_mp_table{0xf8000};

struct Span {
    GuestPhys begin, end;
};

/// Claims the lowest place in the first of the spans that has one.
std::optional<GuestPhys> place(MemoryPlan& plan, std::uint64_t size, std::uint64_t alignment,
                               std::initializer_list<Span> spans) {
    for (const Span& span : spans) {
        const auto at = plan.lowest_of_all(size, {span.begin, span.end, alignment});
        if (!at)
            continue;
        plan.claim(*at, size, "the firmware's data");
        return at;
    }
    return std::nullopt;
}

GuestPhys place_or_reserve(MemoryPlan& plan, std::uint64_t size, std::uint64_t alignment,
                           std::initializer_list<Span> spans, std::string_view what) {
    const auto at = place(plan, size, alignment, spans);
    return at ? *at : plan.reserve(size, what);
}

void copy(const MemoryPlan& plan, std::span<const std::byte> bytes, GuestPhys to) {
    std::ranges::copy(bytes, plan.memory().range(to, bytes.size()).begin());
}

/// Where tables may lie in the extended BIOS data area; an empty span if the kernel has taken what tells of
/// it.
Span place_bios_data(MemoryPlan& plan) {
    constexpr std::uint64_t size = bios_data_end - bios_data_begin;
    constexpr std::uint64_t extended_size = std::uint64_t{extended_bios_data_kib} << 10;
    const bool has_extended =
        plan.is_unclaimed(bios_data_begin, size) && plan.is_unclaimed(extended_bios_data, extended_size);
    if (plan.is_unclaimed(bios_data_begin, size)) {
        plan.claim(bios_data_begin, size, "the BIOS data area");
        write_bios_data(plan.memory(), has_extended);
    }
    if (!has_extended)
        return {};
    plan.claim(extended_bios_data, sizeof extended_bios_data_kib, "the extended BIOS data area");
    return {extended_bios_data, extended_bios_data + extended_size};
}

} // namespace

GuestPhys place_firmware(MemoryPlan& plan) {
    clear_screen(plan.memory());
    const Span extended = place_bios_data(plan);

    const std::uint64_t root_size = make_acpi_tables({}, {}).root_pointer.size();
    const std::uint64_t tables_size = make_acpi_tables({}, {}).tables.size();
    const GuestPhys root = place_or_reserve(plan, root_size, acpi_root_pointer_alignment,
                                            {{bios, extended_memory}, {scanned_by_acpi, bios}, extended},
                                            "the ACPI root pointer");
    const GuestPhys tables_at =
        place_or_reserve(plan, tables_size, acpi_tables_alignment,
                         {{bios, usual_mp_table}, {adapter_memory, extended_memory}}, "the ACPI tables");
    const AcpiTables acpi = make_acpi_tables(tables_at, {});
    copy(plan, acpi.root_pointer, root);
    copy(plan, acpi.tables, tables_at);

    if (const auto at = place(plan, make_mp_table({}, {}).size(), mp_table_alignment,
                              {{usual_mp_table, extended_memory}, {bios, usual_mp_table}, extended}))
        copy(plan, make_mp_table(*at, {}), *at);
    return root;
}

} // namespace umbra
