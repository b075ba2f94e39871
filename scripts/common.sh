# What the scripts share: where things are, how they speak. Sourced, never run.
# shellcheck shell=bash disable=SC2034 # its variables are used by those who source it

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kernel_cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/umbra/kernel

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2:-1}"
}

# Prints the comment block at the head of the calling script, which is its manual.
show_help() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

# Prints the image and the folder of modules, a tab between them, of the newest of Debian's cloud kernels that is
# complete: installed, or unpacked by scripts/setup. Fails when there is none.
find_cloud_kernel() {
    local root image version
    for root in '' "$kernel_cache"; do
        while read -r image; do
            version=${image##*/vmlinuz-}
            if [[ -r $image && -d $root/lib/modules/$version/kernel/arch/x86/kvm ]]; then
                printf '%s\t%s\n' "$image" "$root/lib/modules/$version/kernel"
                return 0
            fi
        done < <(printf '%s\n' "$root"/boot/vmlinuz-*-cloud-amd64 | sort -rV)
    done
    return 1
}

# Prints the names of the project's C++ sources, one a line, from the root of the repository.
list_sources() {
    (cd "$repo" && find shadow vmm launcher guest tests -name '*.[ch]pp' | sort)
}

# Usage: build FOLDER [TARGET [CMAKE-OPTIONS]]. A folder that exists keeps the generator it was made with.
build() {
    local folder=$1 target=${2:-all}
    local generator=()
    if [[ ! -e $folder/CMakeCache.txt ]]; then generator=(-G Ninja); fi
    cmake -S "$repo" -B "$folder" "${generator[@]}" "${@:3}" && cmake --build "$folder" --target "$target" --parallel "$(nproc)"
}
