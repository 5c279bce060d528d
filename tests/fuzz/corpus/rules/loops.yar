private rule P { strings: $p = "private rule" condition: $p }
global rule G { condition: filesize > 0 }
rule Loops {
    strings: $a1 = "first" $a2 = "second" $b = "third"
    condition:
        P and for any i in (1..#a1) : (@a1[i] + 10 < @b)
        or for all of ($a*) : ($ in (0..1024))
        or any of them or all of ($a*) or 50% of them
        or ($b at 0x10 and uint32be(@b + 4) == 0xdeadbeef)
        or for 2 s in ($a1, $a2, $b) : ($)
}
