-- The subset of Quarto's markdown that the chapters use, as a pandoc filter.
-- Anything else that Quarto would treat in its own way stops the build.

local callouts = { note = "Note", tip = "Tip", warning = "Warning", important = "Important", caution = "Caution" }
local kinds = { fig = "Figure", tbl = "Table", eq = "Equation", sec = "Section" }
local plain_divs = { cell = true, ["cell-output"] = true, section = true, ["source-link"] = true }
local numbered, count = {}, {}

local function kind_of(id)
  local prefix = id:match("^(%a+)%-")
  return prefix and kinds[prefix]
end

local function number(id)
  local kind = kind_of(id)
  if kind and not numbered[id] then
    count[kind] = (count[kind] or 0) + 1
    numbered[id] = { kind = kind, n = count[kind] }
  end
  return numbered[id]
end

local function callout(div, name)
  local body, title = div.content, div.attributes.title
  if not title and body[1] and body[1].t == "Header" then
    title = pandoc.utils.stringify(body[1])
    body:remove(1)
  end
  local head = pandoc.Div({ pandoc.Plain({ pandoc.Str(title or callouts[name]) }) }, { class = "callout-title" })
  return pandoc.Div({ head, pandoc.Div(body, { class = "callout-body" }) }, { class = "callout callout-" .. name })
end

local function div(el)
  for name in pairs(callouts) do
    if el.classes:includes("callout-" .. name) then return callout(el, name) end
  end
  local class = el.classes[1]
  if class and not plain_divs[class] and not class:match("^callout") and not class:match("^cell%-output") then
    error("the block class ." .. class .. " is not supported")
  end
end

-- `$$ ... $$ {#eq-x}`: number the equation and give it its anchor
local function equations(inlines)
  local out, i = pandoc.List(), 1
  while i <= #inlines do
    local el, next_i = inlines[i], i + 1
    if el.t == "Math" and el.mathtype == "DisplayMath" then
      local j = i + 1
      while inlines[j] and (inlines[j].t == "Space" or inlines[j].t == "SoftBreak") do j = j + 1 end
      local id = inlines[j] and inlines[j].t == "Str" and inlines[j].text:match("^{#(eq%-[%w%-]+)}$")
      if id then
        local label = pandoc.Span({ pandoc.Str("(" .. number(id).n .. ")") }, { class = "eqno" })
        el, next_i = pandoc.Span({ el, label }, { id = id, class = "equation" }), j + 1
      end
    end
    out:insert(el)
    i = next_i
  end
  return out
end

local function captioned(el)
  local ref = number(el.identifier)
  local first = el.caption.long and el.caption.long[1]
  if ref and first then
    first.content:insert(1, pandoc.Str(ref.kind .. " " .. ref.n .. ": "))
  end
  return el
end

-- columns as wide as their content asks for
local function tables(el)
  for i, spec in ipairs(el.colspecs) do el.colspecs[i] = { spec[1], nil } end
  return captioned(el)
end

local function image(el)
  if el.attributes["fig-alt"] then
    el.attributes.alt, el.attributes["fig-alt"] = el.attributes["fig-alt"], nil
    return el
  end
end

local function heading(el)
  if el.identifier:match("^sec%-") then number(el.identifier) end
end

local function refuse_shortcode(el)
  if el.text:match("^{{<") then error("shortcodes are not supported: " .. el.text) end
end

local function refuse_raw(el)
  if el.text:match("<script") or el.text:match("<iframe") then error("raw HTML with a script: " .. el.text) end
end

local function refuse_diagram(el)
  local class = el.classes[1] or ""
  if class:match("[{}]") or class == "mermaid" or class == "dot" then error("code blocks of " .. class .. " are not supported") end
end

local function cite(el)
  local id = el.citations[1].id
  local ref = numbered[id]
  if ref then
    return pandoc.Link({ pandoc.Str(ref.kind .. "\u{a0}" .. ref.n) }, "#" .. id, "", { class = "xref" })
  end
  if kind_of(id) then error("unresolved cross-reference @" .. id) end
end

function Pandoc(doc)
  doc = doc:walk({ Str = refuse_shortcode, RawBlock = refuse_raw, RawInline = refuse_raw, CodeBlock = refuse_diagram })
  doc = doc:walk({ Div = div, Image = image })
  doc = doc:walk({ Inlines = equations, Figure = captioned, Table = tables, Header = heading })
  return doc:walk({ Cite = cite })
end
