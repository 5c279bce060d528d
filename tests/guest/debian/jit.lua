-- SPDX-License-Identifier: Apache-2.0
--
-- What a just-in-time compiler does: it writes code beside code that runs.
-- Programs come in all the time, get hot, are compiled, and are forgotten;
-- in between, compiled code computes for a while.

local FUNCTIONS = 600
local ROUNDS = 200              -- enough to be compiled
local SIEVE = 300000

local function check(got, wanted)
    if got ~= wanted then
        io.stderr:write('got ', tostring(got), ', not ', wanted, '\n')
        os.exit(1)
    end
end

local function sieve(size)
    local composite, count = {}, 0
    for number = 2, size do
        if not composite[number] then
            count = count + 1
            for multiple = number * number, size, number do
                composite[multiple] = true
            end
        end
    end
    return count
end

local source = [[
    return function(rounds)
        local state, text = %d, {}
        for i = 1, rounds do
            state = (state * 69069 + %d) %% 2147483648
            if state %% 3 == 0 then
                text[#text + 1] = state
            elseif state %% 5 == %d then
                state = state + i
            end
        end
        return state
    end
]]

local sum = 0
for number = 1, FUNCTIONS do
    local compiled = assert(loadstring(
        source:format(number, number * 7, number % 5)))()
    sum = (sum + compiled(ROUNDS)) % 2147483648
    if number % 100 == 0 then
        check(sieve(SIEVE), 25997)
    end
end
check(sum, 146696636)
