import "pe"
import "math"
import "hash"
rule Modules {
    strings: $mz = "MZ" $x = "payload"
    condition:
        $mz at 0 and pe.number_of_sections > 3
        and for any section in pe.sections : (section.name == ".text")
        and math.entropy(0, filesize) > 7.0
        and hash.md5(0, 16) == "d41d8cd98f00b204e9800998ecf8427e"
        or (pe.imphash() == "x" and $x) or external_thing contains "y"
}
