# babbler LEFT ANSWER: in place of the guest agent, answers LEFT commands as qemu-ga would, and all others with ANSWER.
# libvirt's own guest-sync is answered always, or nothing else would ever be asked.
left=$1
answer=$2
port=/dev/virtio-ports/org.qemu.guest_agent.0

numbers() { echo "$1" | grep -o "\"$2\": *[0-9]*" | grep -o '[0-9]*$'; }

list_cpus() {
    for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
        online=true fixed=true
        if [ -e "$cpu/online" ]; then fixed=false; [ "$(cat "$cpu/online")" = 1 ] || online=false; fi
        printf '%s{"logical-id": %d, "online": %s, "can-offline": %s}' "$comma" "${cpu##*/cpu}" $online \
            "$([ $fixed = true ] && echo false || echo true)"
        comma=,
    done
}

list_blocks() {
    for block in /sys/devices/system/memory/memory[0-9]*; do
        online=false
        [ "$(cat "$block/state")" = online ] && online=true
        printf '%s{"phys-index": %d, "online": %s, "can-offline": true}' "$comma" "${block##*/memory}" $online
        comma=,
    done
}

set_cpus() {
    done=0
    for cpu in $(numbers "$1" logical-id); do
        echo 1 >"/sys/devices/system/cpu/cpu$cpu/online" && done=$((done + 1))
    done
    echo $done
}

set_blocks() {
    for block in $(numbers "$1" phys-index); do
        echo online >"/sys/devices/system/memory/memory$block/state"
        printf '%s{"phys-index": %d, "response": "success"}' "$comma" "$block"
        comma=,
    done
}

truly() {
    comma=
    case $1 in
        *guest-get-vcpus*) echo "[$(list_cpus)]" ;;
        *guest-set-vcpus*) set_cpus "$1" ;;
        *guest-get-memory-block-info*) echo "{\"size\": $((0x$(cat /sys/devices/system/memory/block_size_bytes)))}" ;;
        *guest-get-memory-blocks*) echo "[$(list_blocks)]" ;;
        *guest-set-memory-blocks*) echo "[$(set_blocks "$1")]" ;;
        *guest-file-open*) echo 7 ;;
        *guest-file-read*) echo "{\"buf-b64\": \"$(base64 </proc/meminfo | tr -d '\n')\", \"eof\": true}" ;;
        *) echo '{}' ;;
    esac
}

exec 3<>$port
while :; do
    # The port reads as ended until the host has opened its side.
    read -r line <&3 || { usleep 100000; continue; }
    case $line in
        *guest-sync-delimited*) printf '\377{"return": %s}\n' "$(numbers "$line" id)" >&3 ;;
        *guest-sync*) printf '{"return": %s}\n' "$(numbers "$line" id)" >&3 ;;
        *)
            echo "$line" >>/run/babbler.asked
            if [ "$left" -gt 0 ]; then
                left=$((left - 1))
                printf '{"return": %s}\n' "$(truly "$line")" >&3
            else
                printf "$answer\n" >&3
            fi
            ;;
    esac
done
