# What the scripts share: where things are, how they speak. Sourced, never run.
# shellcheck shell=bash disable=SC2034 # its variables are used by those who source it

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kernel_cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/umbra/kernel
guests_cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/umbra/guests # kernels that are only run by umbra

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2:-1}"
}

# Prints the comment block at the head of the calling script, which is its manual.
show_help() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

# Prints the image of the newest of Debian's cloud kernels that has its modules: installed, or unpacked by scripts/setup.
# Fails when there is none.
find_cloud_kernel() {
    local root image version
    for root in '' "$kernel_cache"; do
        while read -r image; do
            version=${image##*/vmlinuz-}
            if [[ -r $image && -d $root/lib/modules/$version/kernel/drivers/virtio ]]; then
                echo "$image"
                return 0
            fi
        done < <(printf '%s\n' "$root"/boot/vmlinuz-*-cloud-amd64 | sort -rV)
    done
    return 1
}

# Usage: collect_kernels FOLDER. Puts the real kernels that the integration tests boot into it, by names that do not
# change: those that are on this machine (scripts/setup).
collect_kernels() {
    local folder=$1 name kernel
    mkdir -p "$folder"
    if kernel=$(find_cloud_kernel); then
        cp "$kernel" "$folder/vmlinuz" && "$repo/scripts/make-initramfs" "$folder/initramfs"
    fi
    for name in gnumach.gz xen.gz invaders; do
        if [[ -r $guests_cache/$name ]]; then cp "$guests_cache/$name" "$folder/$name"; fi
    done
}

# Copies HOST (file or directory) to GUEST in the tree of files at ROOT, with the shared libraries of the programs in it.
# Copies and not links: a later addition may go into a directory that an earlier one brought.
add_files() {
    local root=$1 host=$2 guest=$3 file library
    [[ -e $host ]] || die "$host: no such file" 2
    mkdir -p "$root/$(dirname "$guest")"
    cp -RLT --preserve=mode,timestamps "$host" "$root/$guest" || die "cannot read $host" 2
    while read -r file; do
        # A guest kernel or a static program has no libraries, and a script is no program: ldd fails, rightly.
        while read -r library; do
            [[ -e $root/$library ]] || install -D -m 755 "$library" "$root/$library"
        done < <(ldd "$file" 2>/dev/null | grep -o '/[^ ]*')
    done < <(find -L "$host" -type f -perm -u+x)
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
