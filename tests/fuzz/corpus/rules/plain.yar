import "pe"
rule Plain : tag other {
    meta: author = "a" score = 75 flag = true
    strings:
        $a = "some text\x41\n" nocase wide ascii fullword
        $b = { 4D 5A ?? 9? [2-4] ( 01 | 02 03 ) ~00 }
        $c = /ab[a-f0-9]{2,5}(x|y)*\.dll/i
        $d = "xored text" xor(1-255)
        $e = "base64 text" base64
        $ = "anonymous" private
    condition:
        uint16(0) == 0x5A4D and filesize < 2MB and 2 of ($a, $b, $c*)
        and not $d and (#e > 2 or @a[1] < 100)
}
