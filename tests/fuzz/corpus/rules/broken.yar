include "/etc/passwd"
rule Unended { strings: $a = "no end
rule Regex { strings: $a = /(((a+)+)+)+$/ condition: $a }
rule Comment { /* condition: true } */ condition: true // }
}
rule Twice { condition: true } rule Twice { condition: true }
