# Completion of umbra's command line in bash. Subcommands, options and the words that they take come from umbra's own
# help, names and tags of test cases from `umbra test --list`: there is nothing here that could differ from them.
# shellcheck shell=bash

# Puts those lines of standard input into COMPREPLY that begin with $1.
_umbra_offer() {
    local line
    while IFS= read -r line; do
        if [[ $line == "$1"* ]]; then COMPREPLY+=("$line"); fi
    done
}

# Completes $1 to files, or with -d as $2 to folders.
_umbra_files() {
    compopt -o filenames # bash puts backslashes into them
    are_files=1
    mapfile -t COMPREPLY < <(compgen "${2:--f}" -- "$1")
}

# The cases of a command line, as `umbra test --list` prints them with the options $1: of the words behind them that are
# paths.
_umbra_cases() {
    local word paths=()
    for word in "${@:2}"; do
        if [[ $word != -* && -e $word ]]; then paths+=("$word"); fi
    done
    "$umbra" test "$1" "${paths[@]}" 2>/dev/null
}

# Completes $2 as the value of the option $1.
_umbra_value() {
    local option=$1 value=$2 type=${types[$1]-} text=${texts[$1]-} before=''
    case $subcommand$option in
    test--filter | test--tag) # with - before it, what is left out
        if [[ $value == -* ]]; then before=-; fi
        _umbra_offer "$value" < <(if [[ $option == --filter ]]; then
            _umbra_cases --list "${words[@]:2}"
        else
            _umbra_cases --list=json "${words[@]:2}" |
                sed -n '/^ *"tags": \[$/,/\]/s/^ *"\([^"]*\)",\{0,1\}$/\1/p' | sort -u
        fi | sed "s/^/$before/")
        return
        ;;
    *--cpu) # "..., of NAME, NAME"
        if [[ $value == *,* ]]; then before=${value%,*},; fi
        local feature features
        read -ra features <<<"${text##* of }"
        for feature in "${features[@]%,}"; do
            _umbra_offer "$value" <<<"$before+$feature"$'\n'"$before-$feature"
        done
        return
        ;;
    *--serial) _umbra_offer "$value" <<<$'stdio\nnone' ;;
    esac
    case $type in
    *'{'*) # LEVEL:{debug,info}=info
        type=${type#*\{}
        type=${type%\}*}
        _umbra_offer "$value" <<<"${type//,/$'\n'}"
        ;;
    FILE* | WHERE*)
        local words_too=("${COMPREPLY[@]}")
        _umbra_files "$value"
        COMPREPLY+=("${words_too[@]}")
        ;;
    DIR*) _umbra_files "$value" -d ;;
    '') # a flag: "--stats or --stats=json"
        while [[ $text =~ [^A-Za-z]=([a-z]+)|$option=([a-z]+) ]]; do
            text=${text#*"${BASH_REMATCH[0]}"}
            _umbra_offer "$value" <<<"${BASH_REMATCH[1]}${BASH_REMATCH[2]}"
        done
        ;;
    esac
}

_umbra() {
    local umbra=${1/#\~/$HOME} subcommand='' words=() current='' are_files='' line names=() name IFS=$' \t\n'
    local -A types=() texts=()
    COMPREPLY=()

    # Not COMP_WORDS: it has "--engine=native" in three pieces.
    line=${COMP_LINE:0:COMP_POINT}
    # shellcheck disable=SC2162 # what backslashes are before belongs to a word
    read -a words <<<"$line"
    if [[ $line == *[[:space:]] && $line != *\\[[:space:]] ]]; then words+=(''); fi
    current=${words[-1]}
    if ((${#words[@]} > 2)); then subcommand=${words[1]}; fi
    if [[ $subcommand == -* || " ${words[*]:0:${#words[@]}-1} " == *" -- "* ]]; then return; fi

    # "  -m,--memory SIZE=128M       Guest memory", and maybe further lines.
    while IFS= read -r line; do
        if [[ $line =~ ^\ \ (-[^ ]+)(\ ([A-Z][^ ]*))? ]]; then
            local type=${BASH_REMATCH[3]}
            read -ra names <<<"${BASH_REMATCH[1]//,/ }"
            names=("${names[@]%\{*}") # {false}: a flag's opposite
            for name in "${names[@]}"; do types[$name]=${type%Excludes:}; done
        elif [[ -z $line ]]; then
            names=()
        fi
        for name in "${names[@]}"; do texts[$name]+=" $line"; done
    done < <("$umbra" ${subcommand:+"$subcommand"} --help 2>/dev/null)

    if [[ $current == --*=* ]]; then
        _umbra_value "${current%%=*}" "${current#*=}"
        current=${current#*=}
    elif [[ ${#words[@]} -gt 2 && ${types[${words[-2]}]-} ]]; then
        _umbra_value "${words[-2]}" "$current"
    elif [[ $current == -* ]]; then
        _umbra_offer "$current" < <(printf '%s\n' "${!types[@]}")
    elif [[ -z $subcommand ]]; then
        _umbra_offer "$current" < <("$umbra" --help 2>/dev/null | sed -n '/^Subcommands:/,$s/^  \([a-z]*\) .*/\1/p')
    elif [[ $subcommand == report ]]; then
        _umbra_files "$current" -d
    elif [[ $subcommand == exec ]]; then
        mapfile -t COMPREPLY < <(compgen -c -- "$current")
    elif [[ $subcommand != probe ]]; then
        _umbra_files "$current"
    fi

    # bash replaces only what is behind the last = or : in a word.
    if [[ $current == *[=:]* ]]; then
        local before=${current%"${current##*[=:]}"}
        COMPREPLY=("${COMPREPLY[@]#"$before"}")
    fi
    for name in "${!COMPREPLY[@]}"; do
        if [[ ! $are_files && ${COMPREPLY[name]} == *[$' \t"\'\\$;&|<>()`']* ]]; then
            printf -v "COMPREPLY[$name]" %q "${COMPREPLY[name]}"
        fi
    done
}
complete -F _umbra umbra
